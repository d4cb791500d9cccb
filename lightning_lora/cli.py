"""LoRACLI: a LightningCLI whose config file has a `lora:` block."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .callback import LoRACallback
from .notices import tell
from .trainer.lightning_packages import first_package

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    if find_spec("jsonargparse") is None:
        raise ModuleNotFoundError('LoRACLI: needs jsonargparse; pip install "lightning-lora[cli]".')
    LightningCLI = import_module(f"{first_package().__name__}.cli").LightningCLI


class LoRACLI(LightningCLI):
    """A LightningCLI with LoRACallback's options under `lora:` in the config file and `--lora.` on the command line.

    Lightning has two packages, `lightning.pytorch` and `pytorch_lightning`. LoRACLI is the LightningCLI of the package
    that the program has imported, of `lightning.pytorch` for both or none. For the other one write a class of your own,
    `class CLI(pytorch_lightning.cli.LightningCLI)`, with the line
    `add_arguments_to_parser = LoRACLI.add_arguments_to_parser`. Needs the extra `cli` (jsonargparse).

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cli = LoRACLI(BoringModel, run=False, args=["--lora.r=1", "--lora.save=merged"])
        >>> next(each for each in cli.trainer.callbacks if isinstance(each, LoRACallback))
        LoRACallback(r=1, save='merged')
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `lora` block. A subclass that overrides this method calls super()."""
        parser.add_lightning_class_args(LoRACallback, "lora")

    def _parse_ckpt_path(self) -> None:
        """Pass over the hyper-parameters in an untrusted checkpoint: Lightning's parser would call what they name."""
        options = self.config[self.config.subcommand] if self.config.get("subcommand") else {}
        if options.get("weights_only") is False:
            super()._parse_ckpt_path()
        elif path := options.get("ckpt_path"):
            tell(
                f"LoRACLI: the config alone describes the model; hyper-parameters in {path} are ignored. "
                "--weights_only=false uses them, and may call code that they name."
            )
