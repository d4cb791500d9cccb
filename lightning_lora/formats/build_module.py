"""Building a LightningModule from a checkpoint as its class does, but with none of the checkpoint's weights."""

from __future__ import annotations

import functools
import inspect
import io
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import LoRAError, sentence
from ..files.inert_pickle import find_placeholder
from ..files.paths import PathLike
from ..names import META, names_factor
from .hyper_parameters import HYPER_PARAMETERS, INSTANTIATOR, class_named_by, flat, plain_arguments

EARLIER_KEYS = ("hparams", "module_arguments")  # of Lightning before 0.8, which it still reads
KIND = "hparams_type"  # its key of a class that the hyper-parameters are put into
TRAINER_STATE_KEYS = ("callbacks", "loops", "lr_schedulers", "optimizer_states")  # no module is built from these
# Packages that read a checkpoint's hyper-parameters.
BUILDERS = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "jsonargparse", "packaging")
READ, LOAD = "load_from_checkpoint", "on_load_checkpoint"  # methods in which a class may look at the file's tensors


def build_module(
    cls: Any, path: PathLike, checkpoint: Mapping[str, Any], weights_only: bool | None, kwargs: Mapping[str, Any]
) -> Any:
    """Let Lightning build a module from a checkpoint's hyperparameters, with the weights that its class builds.

    Nothing that the file names is imported or called, unless the caller gave weights_only=False. Without it, a
    checkpoint of LightningCLI's is built from its plain values.

    A class may look at tensors in the file by itself, for example to build a loss from its buffers. It finds the
    tensors that the checkpoint holds under the plain model's names. They are not loaded: a merged checkpoint holds W'
    there, and the values from before training would be lost.

    Args:
        cls: the LightningModule's class.
        path: where the checkpoint was read from.
        checkpoint: its content; objects may be placeholders.
        weights_only: as in Lightning's own load_from_checkpoint.
        kwargs: hyperparameters that override the saved ones.

    Raises:
        LoRAError: the hyperparameters hold objects that were not unpickled, or name code.
    """
    content, saved = _content_for_class(checkpoint, kwargs), checkpoint.get(HYPER_PARAMETERS)
    looks = _overrides(cls, READ) or any(_overrides(each, LOAD) for each in _derived(cls))
    tensors = checkpoint["state_dict"] if looks else {}  # copied only if needed: they may be large
    content["state_dict"] = {name: value for name, value in tensors.items() if not names_factor(name)}
    _refuse_objects(cls, path, content)
    if not isinstance(content.get(HYPER_PARAMETERS, {}), Mapping):
        found = type(saved).__name__
        raise LoRAError(f"{path}: checkpoint['{HYPER_PARAMETERS}'] must be a mapping, found {found}; it is damaged.")
    options = dict(kwargs)
    if weights_only is not False:
        if content.get(KIND) is not type(saved):
            content.pop(KIND, None)
        options = {**_take_plain_arguments(cls, path, content, kwargs), **options}
        if "hparams_file" in options:
            options[INSTANTIATOR] = None  # goes before what that file says
    if any("weights_only" in inspect.signature(load).parameters for load in _definitions(cls, READ)):
        options["weights_only"] = weights_only  # which older versions of Lightning do not have
    return _build(cls, path, content, options, twice=looks)


def _content_for_class(checkpoint: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class may read of a checkpoint: no description of the adapter, and no object without need."""
    content = {
        name: value
        for name, value in checkpoint.items()
        if name != META and (name not in TRAINER_STATE_KEYS or not find_placeholder(value))
    }
    saved = content.get(HYPER_PARAMETERS)
    if isinstance(saved, Mapping):  # an object that the caller gives need not be read
        content[HYPER_PARAMETERS] = {k: v for k, v in saved.items() if k not in kwargs or not find_placeholder(v)}
    return content


def _build(cls: Any, path: PathLike, content: Mapping[str, Any], options: Mapping[str, Any], *, twice: bool) -> Any:
    """Let Lightning build a module from the content of a checkpoint, and load no tensors.

    Args:
        cls: the LightningModule's class.
        path: where the checkpoint was read from, for messages.
        content: of the checkpoint.
        options: arguments of load_from_checkpoint.
        twice: whether the class may read the file by itself too; then it is a file on disk.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        stack.enter_context(_loading_nothing(cls))
        stack.enter_context(_naming_checkpoint(cls, path))
        if not twice:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            buffer.seek(0)
            return _call(cls, buffer, options)
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "checkpoint.ckpt")
        torch.save(content, file)
        return _call(cls, file, options)


def _call(cls: Any, source: Path | io.BytesIO, options: Mapping[str, Any]) -> Any:
    """Call the class's load_from_checkpoint. A class such as chemprop's passes weights_only on by itself."""
    try:
        return cls.load_from_checkpoint(source, strict=False, **options)
    except TypeError as error:
        if "multiple values for keyword argument 'weights_only'" not in str(error):
            raise
    return cls.load_from_checkpoint(source, strict=False, **{k: v for k, v in options.items() if k != "weights_only"})


@contextmanager
def _naming_checkpoint(cls: Any, path: PathLike) -> Iterator[None]:
    """Raise LoRAError in place of an error of Lightning or jsonargparse. An error of the class itself stays."""
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in BUILDERS:
            raise
        raise LoRAError(
            f"load_from_checkpoint: {cls.__name__} cannot be built from {path}: {type(error).__name__}: "
            f"{sentence(error)} Pass what is missing or does not fit as keyword arguments, or build the module "
            f'yourself: load_adapter(model := {cls.__name__}(...), "{path}").'
        ) from error


@contextmanager
def _loading_nothing(cls: Any) -> Iterator[None]:
    """Let Lightning load no tensors into a module of a class or a derived one, after on_load_checkpoint saw them."""
    with ExitStack() as stack:
        for each in _derived(cls):
            if each is cls or LOAD in vars(each):
                own = vars(each).get(LOAD)
                setattr(each, LOAD, _emptying(getattr(each, LOAD)))
                stack.callback(*((setattr, each, LOAD, own) if own else (delattr, each, LOAD)))
        yield


def _emptying(own: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return an on_load_checkpoint that calls the class's own, and then lets the next load_state_dict do nothing."""

    @functools.wraps(own)
    def on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
        def load_nothing(*args: Any, **kwargs: Any) -> Any:
            del vars(module)["load_state_dict"]
            return _IncompatibleKeys([], [])

        own(module, checkpoint)
        if getattr(type(module), LOAD) is on_load_checkpoint:  # a derived class's, which called this, may go on
            checkpoint["state_dict"] = {}
            vars(module)["load_state_dict"] = load_nothing  # a module's own may ask for entries that it wrote

    return on_load_checkpoint


def _derived(cls: type) -> list[type]:
    """List a class and its subclasses: a checkpoint of LightningCLI's may be built from a subclass."""
    children: list[type] = cls.__subclasses__()
    return list(dict.fromkeys([cls, *(each for child in children for each in _derived(child))]))


def _overrides(cls: type, method: str) -> bool:
    """Return whether a class, or a class between it and Lightning's, overrides a method of Lightning's."""
    return len(_definitions(cls, method)) > 1


def _definitions(cls: type, method: str) -> list[Any]:
    """List all definitions of a method, in a class and the classes that it inherits from."""
    return [getattr(base, method) for base in cls.__mro__ if method in vars(base)]


def _take_plain_arguments(
    cls: Any, path: PathLike, content: dict[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Leave in a checkpoint's hyper-parameters the arguments of the class, and nothing that Lightning calls. In place.

    Returns:
        The arguments that the class wants in another form than a file has, such as members of an Enum.

    Raises:
        LoRAError: they name another class, or objects or functions as arguments.
    """
    converted: dict[str, Any] = {}
    for key in (*EARLIER_KEYS, getattr(cls, "CHECKPOINT_HYPER_PARAMS_KEY", HYPER_PARAMETERS)):
        saved = content.get(key)
        if not isinstance(saved, Mapping):
            continue
        named = class_named_by(saved)
        if named is not None and named.rpartition(".")[2] != cls.__name__:
            raise LoRAError(
                f"{path}: was saved by a LightningCLI from the class {named}, and {cls.__name__} was given. No class "
                "that a file names is built: give that class to load_from_checkpoint, or pass weights_only=False if "
                "you trust the file."
            )
        content[key], refused = plain_arguments(cls, saved, kwargs)
        for name, value in refused.items():
            raise LoRAError(
                f"{path}: checkpoint[{key!r}][{name!r}] names {value}, and nothing that a file names is imported or "
                f"called. {_remedies(cls, path, refused)}"
            )
        before, arguments = flat(saved), content[key]
        converted |= {name: value for name, value in arguments.items() if value is not before[name]}
        content[key] = {name: before[name] for name in arguments}
    return converted


def _refuse_objects(cls: Any, path: PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Raise LoRAError where hyper-parameters hold objects that were not unpickled."""
    found = find_placeholder(checkpoint)
    if found is None:
        return
    place, name = found
    saved = checkpoint.get(HYPER_PARAMETERS)
    objects = [key for key, value in saved.items() if find_placeholder(value)] if isinstance(saved, Mapping) else []
    raise LoRAError(
        f"{path}: checkpoint{place} is of {name}, and objects are not unpickled, because that may run any code. "
        f"{_remedies(cls, path, objects)}"
    )


def _remedies(cls: Any, path: PathLike, objects: Iterable[str]) -> str:
    """Return advice for hyper-parameters that are not taken from a file."""
    arguments = ", ".join(f"{key}=..." for key in objects)
    as_arguments = f"pass what they are as keyword arguments ({arguments}), or " if arguments else ""
    return (
        f"If you trust the file, pass weights_only=False; otherwise {as_arguments}build the module yourself: "
        f'load_adapter(model := {cls.__name__}(...), "{path}").'
    )
