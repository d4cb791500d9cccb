"""Names of modules and parameters, how options select them, and this package's keys on models and in checkpoints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

from torch import nn

A, B = "lora_A", "lora_B"  # parameters of an adapted layer
ATTRIBUTE = "lora_injection"  # of the injected module: the record of its injection
META, ENTRY = "lora", "lora_learned"  # keys of an adapter's metadata in a checkpoint, of the record in a state dict
ALL_LINEAR = "all-linear"
COMPILED, CHECKPOINTED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, checkpoint_wrapper

Value = TypeVar("Value")


def canonical(name: str) -> str:
    """Return a module or state name without the segments that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's wrapper, which passes attributes on to it but does not hold them."""
    while COMPILED in model._modules:
        model = cast(nn.Module, model._modules[COMPILED])
    return model


def pattern_matches(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern means a module: PEFT's rule, a match of a dotted suffix."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def names_match(names: str | Sequence[str] | None, name: str) -> bool:
    """Return whether an option means a module: PEFT's rule, a regular expression, or a list of names or suffixes."""
    return matcher(names)(name)


def matcher(names: str | Iterable[str] | None) -> Callable[[str], bool]:
    """Return names_match for many modules, with a look-up instead of a search of the list for each."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda name: expression.fullmatch(name) is not None
    entries = frozenset(names or ())
    return lambda name: not entries.isdisjoint(suffixes(name))


def suffixes(name: str) -> list[str]:
    """Return a module's name, and what is left of it without its first, first two, ... segments."""
    return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


def around(name: str) -> list[str]:
    """Return the names of the modules that a parameter or module is inside of, outermost first."""
    return [name[:i] for i, character in enumerate(name) if character == "."]


def names_factor(name: str) -> bool:
    """Return whether the name of a parameter or tensor is that of A or B."""
    return name.rpartition(".")[2] in (A, B)


def rename_keys(values: Mapping[str, Value], new_name: Callable[[str], str | None]) -> dict[str, Value]:
    """Return values by their new names, without those that have none."""
    pairs = ((new_name(name), value) for name, value in values.items())
    return {name: value for name, value in pairs if name is not None}


def near_misses(entry: str, names: Iterable[str]) -> str:
    """Return a hint with the names that look most like `entry`, or with the first names there are."""
    names = list(names)
    known = {suffix for name in names for suffix in suffixes(name)}
    close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"; there are {shown}" if names else "; there are none"
