"""Names: of modules and their suffixes, of parameters, and of this package's own keys in checkpoints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import nn

COMPILED, CHECKPOINTED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, checkpoint_wrapper


def canonical(name: str) -> str:
    """A module or state name without the segments that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, which passes attributes on to it but does not hold them."""
    while COMPILED in model._modules:
        model = cast(nn.Module, model._modules[COMPILED])
    return model


A, B = "lora_A", "lora_B"

ALL_LINEAR = "all-linear"


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern: the regular expression ends a dotted suffix."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def entries_of(value: str | Iterable[str] | None) -> list[str | tuple[str]]:
    """The separate entries of an option, each in a form that names_match understands."""
    if value is None or value == ALL_LINEAR:
        return []
    return [value] if isinstance(value, str) else [(entry,) for entry in value]


def entry_name(entry: str | tuple[str]) -> str:
    """An entry as the user wrote it."""
    return entry if isinstance(entry, str) else entry[0]


def names_match(names: str | Sequence[str] | None, name: str) -> bool:
    """PEFT's rule: a string is a full-match regular expression, a list holds whole names or dotted suffixes."""
    return matcher(names)(name)


def matcher(names: str | Iterable[str] | None) -> Callable[[str], bool]:
    """names_match for many modules, with a look-up instead of a search of the list for each."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda name: expression.fullmatch(name) is not None
    entries = frozenset(names or ())
    return lambda name: not entries.isdisjoint(suffixes(name))


def suffixes(name: str) -> list[str]:
    """A module's name, and what is left of it without its first, second, ... segment."""
    return [name, *(name[dot + 1 :] for dot in _dots(name))]


def around(name: str) -> list[str]:
    """The modules on the way to a parameter or module, without itself."""
    return [name[:dot] for dot in _dots(name)]


def _dots(name: str) -> list[int]:
    return [i for i, character in enumerate(name) if character == "."]


def near_misses(entry: str, names: Iterable[str]) -> str:
    """A hint with the names that look most like `entry`, or with the first names there are."""
    names = list(names)
    known = {suffix for name in names for suffix in suffixes(name)}
    close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"; there are {shown}" if names else "; there are none"


ATTRIBUTE = "lora_injection"

META = "lora"

ENTRY = "lora_learned"
