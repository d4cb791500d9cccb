"""How options select modules by name, and hints for entries that select none."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from .names import listed, suffixes

ALL_LINEAR = "all-linear"  # a value of target_modules
ALL_LAYERS = "all-layers"  # another
BY_KIND = (ALL_LINEAR, ALL_LAYERS)  # which select layers by their kind; model/layers_by_kind.py says what they mean
# Usual names of layers in transformers models. A list in target_modules may name layers that a model does not have.
USUAL_NAMES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"),
    *("gate_up_proj", "query", "key", "value", "qkv", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("proj", "fc1", "fc2", "fc_in", "fc_out", "c_attn", "c_fc", "c_proj", "w1", "w2", "w3"),
}


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
    return lambda name: not entries.isdisjoint(suffixes(name))


def naming_some(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the entries of a list that are one of the names, or a dotted suffix of one."""
    known = {suffix for name in names for suffix in suffixes(name)}
    return [entry for entry in entries if entry in known]


def near_misses(entry: str, names: Iterable[str]) -> str:
    """Return a hint for an entry that selects nothing: the most similar names, or else the first names."""
    is_set = isinstance(names, (set, frozenset))  # whose order differs from run to run
    names = sorted(names) if is_set else list(names)
    return _did_you_mean(entry, names) or _there_are(list(map(repr, names)), 3)


def near_endings(entry: str, names: Iterable[str]) -> str:
    """Return a hint for an entry that selects nothing: the most similar names, or else the most frequent endings."""
    names = list(names)
    counts = Counter(_ending(name) for name in names)
    endings = [f"{ending!r} ({count})" if count > 1 else repr(ending) for ending, count in counts.most_common()]
    return _did_you_mean(entry, names) or _there_are(endings, 10)


def most_frequent_ending(names: Iterable[str]) -> str:
    """Return the most frequent ending of names, as an example of an entry of target_modules."""
    return Counter(map(_ending, names)).most_common(1)[0][0]


def is_typo(entry: str, names: Iterable[str]) -> bool:
    """Return whether an entry is probably a misspelling of one of `names`. Usual names of layers are not."""
    if entry in USUAL_NAMES:
        return False
    known = {suffix.lower() for name in names for suffix in suffixes(name)}
    same_letters = sorted(entry.lower()) in map(sorted, known)
    return same_letters or bool(difflib.get_close_matches(entry.lower(), known, n=1, cutoff=0.8))


def _did_you_mean(entry: str, names: Iterable[str]) -> str:
    """Return a hint with up to three similar names, or ""."""
    known = {suffix for name in names for suffix in suffixes(name)}
    close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def _there_are(shown: Sequence[str], most: int) -> str:
    """Return a hint with the first of some names."""
    return f"; there are {listed(shown, most)}" if shown else "; there are none"


def _ending(name: str) -> str:
    """Return the last segment of a name; where it is a number, the last two segments."""
    return next(ending for ending in reversed(suffixes(name)) if not ending.isdigit() or ending == name)
