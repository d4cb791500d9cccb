"""LoRACLI: a LightningCLI whose config file has a `lora:` block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from inspect import Signature, isroutine, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .callback import LoRACallback
from .errors import LoRAError, shown
from .files.torch_archive import read_torch_file
from .formats.hyper_parameters import HYPER_PARAMETERS, INSTANTIATOR, class_named_by, flat, plain_arguments
from .trainer.lightning_packages import first_package, package_of

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    if find_spec("jsonargparse") is None:
        raise ModuleNotFoundError('LoRACLI: needs jsonargparse; pip install "lightning-lora[cli]".')
    LightningCLI = import_module(f"{first_package().__name__}.cli").LightningCLI


class _EitherPackage(type):
    """Choose the LightningCLI under a LoRACLI: that of the package from which the given classes come."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        package = _package_among([*args, *kwargs.values()])
        if package in (None, package_of(cls)):
            return super().__call__(*args, **kwargs)
        bases = (cls, import_module(f"{package}.cli").LightningCLI)
        return type(cls)(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})(*args, **kwargs)

    @property
    def __signature__(cls) -> Signature:
        """Return the signature of __init__: that of __call__ would hide it."""
        _, *others = signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return Signature(others)

    def mro(cls) -> list[type]:
        """Put the LightningCLI that a subclass names before the one that LoRACLI itself is derived from."""
        return sorted(super().mro(), key=lambda base: base in (LightningCLI, object))


class LoRACLI(LightningCLI, metaclass=_EitherPackage):
    """A LightningCLI with LoRACallback's options under `lora:` in the config file and `--lora.` on the command line.

    Lightning has two packages, `lightning.pytorch` and `pytorch_lightning`. LoRACLI is the LightningCLI of the package
    that the given model, data or Trainer class comes from. Where only the config file names classes, name the package
    by a class of your own: `class CLI(LoRACLI, pytorch_lightning.cli.LightningCLI)`. Needs the extra `cli`
    (jsonargparse).

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
        """Refuse a checkpoint at ckpt_path whose hyper-parameters name code: Lightning's parser would call it."""
        options = self.config[self.config.subcommand] if self.config.get("subcommand") else {}
        path = options.get("ckpt_path")
        if path and Path(path).is_file() and options.get("weights_only") is not False:
            saved = read_torch_file(path, "meta").get(HYPER_PARAMETERS)
            if isinstance(saved, Mapping):
                _refuse_code(path, saved, options.get("model"), self._model_class)
        super()._parse_ckpt_path()


def _refuse_code(path: str, saved: Mapping[str, Any], config: Any, model_class: Any) -> None:
    """Raise LoRAError where hyper-parameters name a class or function, and the config does not name the same."""
    saved = {INSTANTIATOR: None, **saved}
    own = config.as_dict() if config is not None else {}
    named, own_class = class_named_by(saved), own.get("class_path")
    values = {**(own.get("init_args") or {}), **(own.get("dict_kwargs") or {})} if own_class else own
    same = [name for name, value in flat(saved).items() if name in values and _equal(value, values[name])]
    module, _, name = (own_class or "").rpartition(".")
    kind = getattr(import_module(module), name) if own_class else model_class
    refused = plain_arguments(kind, saved, same, parsed=True)[1]
    if named is not None and named != own_class:
        refused = {"class": shown(named)}
    for name, value in refused.items():
        raise LoRAError(
            f"{path}: checkpoint[{HYPER_PARAMETERS!r}] names {value} as the model's {name}, and the config does not. "
            "Nothing that a file alone names is imported or called: give the config of the training, or "
            "--weights_only=false if you trust the file."
        )


def _equal(value: Any, own: Any) -> bool:
    try:
        return type(value) is type(own) and bool(value == own)
    except (TypeError, ValueError, RuntimeError):  # tensors and arrays have no single truth value
        return False


def _package_among(given: Iterable[Any]) -> str | None:
    """Return the package of the first class that comes from Lightning. A function counts by its return annotation."""
    types = (get_type_hints(value).get("return") if isroutine(value) else value for value in given)
    packages = (package_of(cls) for cls in types if isinstance(cls, type))
    return next((package for package in packages if package), None)
