"""Building a LightningModule from a checkpoint as its class does, but with none of the checkpoint's weights."""

from __future__ import annotations

import inspect
import io
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import LoRAError, sentence
from ..files.inert_pickle import find_placeholder
from ..files.paths import PathLike
from ..formats.hyper_parameters import HYPER_PARAMETERS, INSTANTIATOR, class_named_by, flat, plain_arguments
from ..formats.lightning_checkpoint import Kind
from ..names import META

EARLIER_KEYS = ("hparams", "module_arguments")  # of Lightning before 0.8, which it still reads
KIND = "hparams_type"  # its key of a class that the hyper-parameters are put into
TRAINER_STATE_KEYS = ("callbacks", "loops", "lr_schedulers", "optimizer_states")  # no module is built from these
# Packages that read a checkpoint's hyper-parameters.
BUILDERS = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "jsonargparse", "packaging")
READERS = ("load_from_checkpoint", "on_load_checkpoint")  # methods in which a class may look at the file's tensors


def build_module(
    cls: Any, path: PathLike, checkpoint: Mapping[str, Any], weights_only: bool | None, kwargs: Mapping[str, Any]
) -> Any:
    """Let Lightning build a module from a checkpoint's hyperparameters, with the weights that its class builds.

    Nothing that the file names is imported or called, unless the caller gave weights_only=False. Without it, a
    checkpoint of LightningCLI's is built from its plain values.

    The class finds no tensors in the file. A merged checkpoint would bring W' in place of the values from before
    training.

    Args:
        cls: the LightningModule's class.
        path: where the checkpoint was read from.
        checkpoint: its content; objects may be placeholders.
        weights_only: as in Lightning's own load_from_checkpoint.
        kwargs: hyperparameters that override the saved ones.

    Raises:
        LoRAError: the hyperparameters hold objects that were not unpickled, or name code, or the class cannot be built
            without the file's tensors.
    """
    content, saved = _content_for_class(checkpoint, kwargs), checkpoint.get(HYPER_PARAMETERS)
    kind: Kind = checkpoint[META]["kind"]
    _refuse_objects(cls, path, content, kind)
    if not isinstance(content.get(HYPER_PARAMETERS, {}), Mapping):
        found = type(saved).__name__
        raise LoRAError(f"{path}: checkpoint['{HYPER_PARAMETERS}'] must be a mapping, found {found}; it is damaged.")
    options = dict(kwargs)
    if weights_only is not False:
        if content.get(KIND) is not type(saved):
            content.pop(KIND, None)
        options = {**_take_plain_arguments(cls, path, content, kwargs, kind), **options}
        if "hparams_file" in options:
            options[INSTANTIATOR] = None  # goes before what that file says
    definitions = [getattr(base, READERS[0]) for base in cls.__mro__ if READERS[0] in vars(base)]
    if any("weights_only" in inspect.signature(each).parameters for each in definitions):
        options["weights_only"] = weights_only  # which older versions of Lightning do not have
    by_hand = lines_by_hand(cls.__name__, path, kind, trusted=weights_only is False)
    torch.save(content, buffer := io.BytesIO())
    buffer.seek(0)
    with warnings.catch_warnings(), _loading_nothing(cls), _naming_checkpoint(cls, path, by_hand):
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        return cls.load_from_checkpoint(buffer, strict=False, **options)


def lines_by_hand(name: str, path: PathLike, kind: Kind, *first: str, trusted: bool = False) -> str:
    """Return the lines that load a checkpoint onto a module that the user builds.

    A full checkpoint brings its base, without which load_adapter refuses another one.

    Args:
        name: of the module's class.
        path: of the checkpoint.
        kind: of the checkpoint.
        first: lines that come before anything is loaded.
        trusted: the file may hold objects, and the user trusts it.
    """
    unpickled = ", weights_only=False" if trusted else ""
    base = f'model.load_state_dict(torch.load("{path}", "cpu"{unpickled})["state_dict"], strict=False)'
    loading = [*([base] if kind == "full" else []), f'load_adapter(model, "{path}")']
    return "; ".join([f"model = {name}(...)", *first, *loading])


def _content_for_class(checkpoint: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class may read of a checkpoint: no tensors, no adapter, and no object without need."""
    content = {name: value for name, value in checkpoint.items() if name not in (META, *TRAINER_STATE_KEYS)}
    content["state_dict"] = {}
    saved = content.get(HYPER_PARAMETERS)
    if isinstance(saved, Mapping):  # an object that the caller gives need not be read
        content[HYPER_PARAMETERS] = {k: v for k, v in saved.items() if k not in kwargs or not find_placeholder(v)}
    return content


@contextmanager
def _loading_nothing(cls: Any) -> Iterator[None]:
    """Let Lightning load no tensors into a module that it has built: layers may ask for entries that they wrote."""
    loading, is_own = cls.on_load_checkpoint, "on_load_checkpoint" in vars(cls)

    def on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
        def load_nothing(*args: Any, **kwargs: Any) -> Any:
            del vars(module)["load_state_dict"]
            return _IncompatibleKeys([], [])

        loading(module, checkpoint)
        vars(module)["load_state_dict"] = load_nothing

    cls.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if is_own:
            cls.on_load_checkpoint = loading
        else:
            del cls.on_load_checkpoint


@contextmanager
def _naming_checkpoint(cls: Any, path: PathLike, by_hand: str) -> Iterator[None]:
    """Raise LoRAError in place of an error of Lightning, or of a class that reads the file by itself.

    Another error of the class stays.

    Args:
        cls: the class that is built.
        path: of the checkpoint.
        by_hand: the lines that load it onto a module that the user builds.
    """
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        outside = [each for each in frames[1:] if each.f_globals["__name__"].partition(".")[0] not in BUILDERS]
        if frames[-1] in outside and not any(each.f_code.co_name in READERS for each in outside):
            raise
        raise LoRAError(
            f"load_from_checkpoint: {cls.__name__} cannot be built from {path}: {type(error).__name__}: "
            f"{sentence(error)} Pass what is missing or does not fit as keyword arguments, or build the module "
            f"yourself: {by_hand}."
        ) from error


def _take_plain_arguments(
    cls: Any, path: PathLike, content: dict[str, Any], kwargs: Mapping[str, Any], kind: Kind
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
                f"called. {_remedies(refused, lines_by_hand(cls.__name__, path, kind))}"
            )
        before, arguments = flat(saved), content[key]
        converted |= {name: value for name, value in arguments.items() if value is not before[name]}
        content[key] = {name: before[name] for name in arguments}
    return converted


def _refuse_objects(cls: Any, path: PathLike, checkpoint: Mapping[str, Any], kind: Kind) -> None:
    """Raise LoRAError where hyper-parameters hold objects that were not unpickled."""
    found = find_placeholder(checkpoint)
    if found is None:
        return
    place, name = found
    saved = checkpoint.get(HYPER_PARAMETERS)
    objects = [key for key, value in saved.items() if find_placeholder(value)] if isinstance(saved, Mapping) else []
    # The base of a full checkpoint is read by torch.load, which refuses the objects too.
    by_hand = "" if kind == "full" else lines_by_hand(cls.__name__, path, kind)
    raise LoRAError(
        f"{path}: checkpoint{place} is of {name}, and objects are not unpickled, because that may run any code. "
        f"{_remedies(objects, by_hand)}"
    )


def _remedies(objects: Iterable[str], by_hand: str) -> str:
    """Return advice for hyper-parameters that are not taken from a file."""
    arguments = ", ".join(f"{key}=..." for key in objects)
    ways = [f"pass what they are as keyword arguments ({arguments})"] if arguments else []
    ways += [f"build the module yourself: {by_hand}"] if by_hand else []
    otherwise = f"; otherwise {', or '.join(ways)}" if ways else ""
    return f"If you trust the file, pass weights_only=False{otherwise}."
