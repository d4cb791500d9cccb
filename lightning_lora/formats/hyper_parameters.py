"""Hyper-parameters out of a checkpoint, as arguments of a class that the user gives.

LightningCLI saves its config as plain types: an object as {"class_path": ..., "init_args": ...}, a function by its
name, a member of an Enum by its name, a tuple as a list. Lightning lets jsonargparse import and call what is named
there. Here a class's own annotations say what plain values become, and what names code is refused.
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..errors import shown

HYPER_PARAMETERS = "hyper_parameters"  # Lightning's key of what save_hyperparameters saved
INSTANTIATOR, CLASS = "_instantiator", "_class_path"  # what LightningCLI adds to it
CLASS_PATH, PARTS = "class_path", ("init_args", "dict_kwargs")  # how it writes an object
COLLECTIONS = (list, tuple, set, frozenset, dict)


def plain_arguments(
    cls: Callable[..., Any], saved: Mapping[str, Any], given: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Split hyper-parameters into arguments that need neither an import nor a call, and those that name code.

    Args:
        cls: the class or function that takes the arguments.
        saved: hyper-parameters, as a checkpoint holds them.
        given: the names of arguments that the caller gives.

    Returns:
        The arguments without `given`; a saved object that fits stays the same object. And a description, by name, of
        each argument that names code or does not fit its annotation.
    """
    values = {name: value for name, value in flat(saved).items() if name not in (INSTANTIATOR, CLASS, *given)}
    hints = _hints(cls) if INSTANTIATOR in saved else {}
    arguments: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, value in values.items():
        named = class_path_in(value)
        try:
            arguments[name] = _fitted(value, hints.get(name, Any))
        except (TypeError, ValueError):
            named = named or shown(value)
        if named:
            refused[name] = named
    return arguments, refused


def class_named_by(saved: Mapping[str, Any]) -> str | None:
    """Return the class from which LightningCLI built the module, where its hyper-parameters say it."""
    if INSTANTIATOR not in saved:
        return None
    named = saved.get(CLASS, saved.get(CLASS_PATH))
    return named if named is None or isinstance(named, str) else shown(named)


def flat(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return hyper-parameters by name, also if LightningCLI saved them as class_path and init_args."""
    if INSTANTIATOR not in saved or not {CLASS_PATH} <= saved.keys() <= {INSTANTIATOR, CLASS_PATH, *PARTS}:
        return saved
    parts = [saved[part] for part in PARTS if isinstance(saved.get(part), Mapping)]
    return {INSTANTIATOR: None, **{name: value for part in parts for name, value in part.items()}}


def class_path_in(value: Any) -> str | None:
    """Return the first class_path in nested containers, or None."""
    waiting, seen = deque([value]), set()
    while waiting:
        item = waiting.popleft()
        if id(item) in seen or not isinstance(item, (Mapping, list, tuple, set, frozenset)):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping) and isinstance(item.get(CLASS_PATH), str):
            return shown(item[CLASS_PATH])
        waiting.extend(item.values() if isinstance(item, Mapping) else item)
    return None


def _hints(cls: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the arguments, of classes whose __init__ passes some on too."""
    functions = (
        [vars(base)["__init__"] for base in reversed(cls.__mro__) if "__init__" in vars(base)]
        if (isinstance(cls, type))
        else [cls]
    )
    hints: dict[str, Any] = {}
    for function in functions:
        try:
            hints |= get_type_hints(function)
        except Exception:  # a name that only type checkers know
            hints |= {name: each.annotation for name, each in inspect.signature(function).parameters.items()}
    return hints


def _fitted(value: Any, hint: Any) -> Any:
    """Convert a value of a config to its annotation. Raises TypeError where that would call other code.

    Needed for checkpoints that LightningCLI wrote of a class with arguments such as an Enum, a dataclass, a Path or a
    tuple: the config has only YAML's plain values for them. jsonargparse converts these too, but it also imports and
    calls what a file names, and who reads a checkpoint may not have it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fitted(value, arguments[0])
    if value is None or hint in (Any, object, inspect.Parameter.empty) or origin is Literal:
        return value
    if origin in (Union, UnionType):
        return _first_fit(value, arguments)
    kind = origin or hint
    if not isinstance(kind, type) or is_typeddict(kind):  # a TypeVar, or a text that names a type
        return value
    if issubclass(kind, Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = _hints(kind)
        return kind(**{name: _fitted(part, hints.get(name, Any)) for name, part in value.items()})
    if kind in (Path, os.PathLike) and isinstance(value, str):
        return Path(value)
    if isinstance(value, Mapping) and issubclass(dict, kind):
        parts = {name: _fitted(part, arguments[1] if arguments[1:] else Any) for name, part in value.items()}
        return parts if any(parts[name] is not value[name] for name in parts) else value
    if isinstance(value, (list, tuple)):
        return _fitted_list(value, kind, arguments)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, kind):
        return value
    raise TypeError("it does not fit the annotation")


def _first_fit(value: Any, hints: tuple[Any, ...]) -> Any:
    """Convert a value to the first of several annotations that fits. Annotations that take it as it is go first."""
    exact = [hint for hint in hints if hint is type(value)]
    for hint in exact or hints:
        if hint is not NoneType:
            try:
                return _fitted(value, hint)
            except TypeError:
                continue
    raise TypeError("it does not fit the annotation")


def _fitted_list(value: list[Any] | tuple[Any, ...], kind: type, hints: tuple[Any, ...]) -> Any:
    if kind is tuple and hints and hints[-1] is not Ellipsis:
        if len(hints) != len(value):
            raise TypeError("it does not fit the annotation")
        return tuple(_fitted(part, hint) for part, hint in zip(value, hints, strict=True))
    parts = [_fitted(part, hints[0] if hints else Any) for part in value]
    fitting = next((each for each in COLLECTIONS if each is not dict and issubclass(each, kind)), None)
    if fitting is None:
        raise TypeError("it does not fit the annotation")
    same = type(value) is fitting and all(part is before for part, before in zip(parts, value, strict=True))
    return value if same else fitting(parts)
