"""How options select modules by name, and hints for entries that select none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .names import listed, suffixes

Entries = str | Collection[str] | None  # the value of an option that names modules or parameters
PATTERNS = ("rank_pattern", "alpha_pattern")  # options whose keys are regular expressions

ALL_LINEAR = "all-linear"  # a value of target_modules
ALL_LAYERS = "all-layers"  # another
CLOSE = 0.8  # how similar an entry must be to a name for a hint beside entries that do name something
BY_KIND = (ALL_LINEAR, ALL_LAYERS)  # which select layers by their kind; model/layers_by_kind.py says what they mean


class NameEnd(str):
    """An entry of PEFT's modules_to_save: it names each module whose name ends in it, as "norm" names "final_norm".

    Our own entries are whole names or dotted suffixes.
    """

    __slots__ = ()


def suffix_pattern(pattern: str) -> str:
    """Return the regular expression for whole names that PEFT builds from a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({pattern})$"


def pattern_matches(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches a module: the whole name or a dotted suffix."""
    return _compiled_suffix(pattern).match(name) is not None


def exact_key(name: str) -> str:
    """Return a key of rank_pattern or alpha_pattern that matches the layer of this name alone."""
    return f"^{re.escape(name)}"


@lru_cache(maxsize=8192)  # some models have more patterns than the cache of Python's `re` holds
def _compiled_suffix(pattern: str) -> re.Pattern[str]:
    return re.compile(suffix_pattern(pattern))


def layer_pattern(pattern: str) -> str:
    """Return the regular expression for the beginning of a name that PEFT builds from an entry of layers_pattern."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def layer_number(name: str, patterns: Iterable[str] | None) -> int | None:
    """Return the number of the layer (block) that a module lies in, by PEFT's rule, or None without a number.

    The number follows the first pattern that matches. Without patterns it is the first number in the name that has at
    least two segments before it.
    """
    expressions = map(layer_pattern, patterns) if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next(filter(None, (re.match(expression, name) for expression in expressions)), None)
    number = found["idx"] if found else None
    return None if number is None else int(number)


def names_match(names: str | Sequence[str] | None, name: str) -> bool:
    """Return whether an option selects a module, by PEFT's rule.

    Args:
        names: a regular expression for the whole name, or a list of names or dotted suffixes of names.
        name: of the module.
    """
    return matcher(names)(name)


def matcher(names: str | Iterable[str] | None) -> Callable[[str], bool]:
    """Return names_match for one option as a function of the name. It is fast for many modules."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda name: expression.fullmatch(name) is not None
    entries = frozenset(names or ())
    if not entries:  # the common case
        return lambda name: False
    ends = tuple(entry for entry in entries if isinstance(entry, NameEnd))
    return lambda name: name.endswith(ends) or not entries.isdisjoint(suffixes(name))


def naming_some(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the entries of a list that are one of the names, or a dotted suffix or NameEnd of one."""
    names = list(names)
    known = {suffix for name in names for suffix in suffixes(name)}
    return [
        entry
        for entry in entries
        if entry in known or (isinstance(entry, NameEnd) and any(name.endswith(entry) for name in names))
    ]


@dataclass
class Unmatched:
    """The entries of options that name nothing in a model.

    Attributes:
        errors: a sentence for each entry of an option of which no entry names anything.
        unused: for each option the entries that name nothing beside others that do: one list may serve many models.
    """

    errors: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def note(
        self, option: str, value: Entries, names: Collection[str], noun: str, hints: Collection[str] | None = None
    ) -> None:
        """Note the entries of an option that name nothing.

        Args:
            option: its name.
            value: a regular expression for the whole name, names or their endings, or a mapping by such entries. Those
                of PATTERNS are regular expressions for a dotted suffix.
            names: what the entries may name.
            noun: of what they should name, for the sentence.
            hints: the names to look for near misses in; by default `names`.
        """
        if not value:
            return
        if isinstance(value, str):
            found = [value] if any(map(matcher(value), names)) else []
            noun += "; a string is a regular expression for the whole name, a list holds names or their endings"
        elif option in PATTERNS:
            found = [entry for entry in value if any(pattern_matches(entry, name) for name in names)]
        else:
            found = naming_some(value, names)
        missing = [entry for entry in dict.fromkeys([value] if isinstance(value, str) else value) if entry not in found]
        if found and missing:
            # One list may serve many models, so an entry that only resembles a name is no slip: only a close one is.
            others = [name for name in (names if hints is None else hints) if not matcher(found)(name)]
            hinted = (repr(entry) + near_miss(entry, others, CLOSE) for entry in missing)
            self.unused.append(f"{option}: {', '.join(hinted)}")
        else:
            shown = _instead_of_expression if isinstance(value, str) else repr
            for entry in missing:
                near = near_misses(entry, names if hints is None else hints, shown)
                self.errors.append(f"{option}: {entry!r} names no {noun}{near}")


def _instead_of_expression(name: str) -> str:
    """Return a value for an option of names in the place of a regular expression that matches nothing."""
    return repr(name if name in BY_KIND else [name])


def near_misses(entry: str, names: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """Return a hint for an entry that names nothing: the most similar names, or else how the names end.

    Args:
        entry: of an option.
        names: that it may be.
        shown: writes such a name.
    """
    names = list(names)
    if close := _close(entry, names, 0.6):
        return f"; did you mean {', '.join(map(shown, close))}?"
    endings = [repr(ending) for ending in dict.fromkeys(map(_ending, names))]
    return f"; there are {listed(endings, 10)}" if endings else "; there are none"


def near_miss(entry: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint in brackets: the most similar name, or "" where none is similar enough."""
    return "".join(f" (did you mean {name!r}?)" for name in _close(entry, names, cutoff)[:1])


def _close(entry: str, names: Iterable[str], cutoff: float) -> list[str]:
    """Return the names, or dotted suffixes of names, that are most similar to an entry."""
    known = {suffix for name in names for suffix in suffixes(name)}
    return difflib.get_close_matches(entry, sorted(known), n=3, cutoff=cutoff)


def _ending(name: str) -> str:
    """Return the last segment of a name; where it is a number, the last two segments."""
    return next(ending for ending in reversed(suffixes(name)) if not ending.isdigit() or ending == name)
