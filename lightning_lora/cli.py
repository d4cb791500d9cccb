"""LoRACLI: a LightningCLI whose config file has a `lora:` block."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .callback import LoRACallback


class LoRACLI(LightningCLI):
    """A LightningCLI with LoRACallback's options under `lora:` in the config file and `--lora.` on the command line.

    Needs the extra `cli` (jsonargparse).
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `lora` block; a subclass that overrides this calls super()."""
        parser.add_lightning_class_args(LoRACallback, "lora")
