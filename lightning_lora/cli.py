"""LoRACLI: a LightningCLI whose config file has a `lora:` block."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from inspect import Signature, isroutine, signature
from typing import TYPE_CHECKING, Any, get_type_hints

from .callback import LoRACallback
from .trainer.lightning_packages import first_package, package_of

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    if find_spec("jsonargparse") is None:
        raise ModuleNotFoundError("LoRACLI: needs jsonargparse; pip install 'jsonargparse[signatures]'.")
    LightningCLI = import_module(f"{first_package().__name__}.cli").LightningCLI


class _EitherPackage(type):
    """Builds a LoRACLI upon the LightningCLI of the package from which the classes come that it is called with."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        package = _package_among([*args, *kwargs.values()])
        if package in (None, package_of(cls)):
            return super().__call__(*args, **kwargs)
        bases = (cls, import_module(f"{package}.cli").LightningCLI)
        return type(cls)(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})(*args, **kwargs)

    @property
    def __signature__(cls) -> Signature:
        """Show the arguments of __init__, which those of __call__ would hide."""
        _, *others = signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return Signature(others)

    def mro(cls) -> list[type]:
        """Put the LightningCLI that is named beside LoRACLI before the one that LoRACLI is derived from."""
        return sorted(super().mro(), key=lambda base: base in (LightningCLI, object))


class LoRACLI(LightningCLI, metaclass=_EitherPackage):
    """A LightningCLI with LoRACallback's options under `lora:` in the config file and `--lora.` on the command line.

    It is the LightningCLI of that package, `lightning.pytorch` or `pytorch_lightning`, from which the given model, data
    or Trainer class comes. Where the config file names them all, say it: `class CLI(LoRACLI, pytorch_lightning.cli.
    LightningCLI)`. Needs the extra `cli` (jsonargparse).
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `lora` block; a subclass that overrides this calls super()."""
        parser.add_lightning_class_args(LoRACallback, "lora")


def _package_among(given: Iterable[Any]) -> str | None:
    """Name the package of Lightning of the first class of it, or of a function that is said to return one."""
    types = (get_type_hints(value).get("return") if isroutine(value) else value for value in given)
    packages = (package_of(cls) for cls in types if isinstance(cls, type))
    return next((package for package in packages if package), None)
