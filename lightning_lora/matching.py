"""How options select modules by name, and hints for entries that select none."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from .names import listed, suffixes

ALL_LINEAR = "all-linear"


USUAL_NAMES = {  # names of layers in transformers: one list may serve many models, each of which has some of them
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"),
    *("gate_up_proj", "query", "key", "value", "qkv", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("proj", "fc1", "fc2", "fc_in", "fc_out", "c_attn", "c_fc", "c_proj", "w1", "w2", "w3"),
}


def suffix_pattern(pattern: str) -> str:
    """Return the expression for whole names that PEFT builds from a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({pattern})$"


def pattern_matches(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern means a module: it matches a dotted suffix of the name."""
    return _compiled_suffix(pattern).match(name) is not None


def exact_key(name: str) -> str:
    """Return the key of rank_pattern or alpha_pattern that means the layer of this name and no other."""
    return f"^{re.escape(name)}"


@lru_cache(maxsize=8192)  # Python's own cache is smaller than some models have patterns
def _compiled_suffix(pattern: str) -> re.Pattern[str]:
    return re.compile(suffix_pattern(pattern))


def layer_pattern(pattern: str) -> str:
    """Return the expression for the beginning of a name that PEFT builds from an entry of layers_pattern."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def layer_number(name: str, patterns: Iterable[str] | None) -> int | None:
    """Return the number of the layer (block) that a module is in, by PEFT's rule, or None.

    The number follows the first pattern that fits. Without patterns it is the first number in the name that comes after
    two segments or more.
    """
    expressions = map(layer_pattern, patterns) if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next(filter(None, (re.match(expression, name) for expression in expressions)), None)
    number = found["idx"] if found else None
    return None if number is None else int(number)


def names_match(names: str | Sequence[str] | None, name: str) -> bool:
    """Return whether an option means a module, by PEFT's rule.

    A string is a regular expression for the whole name. A list holds names or dotted suffixes.
    """
    return matcher(names)(name)


def matcher(names: str | Iterable[str] | None) -> Callable[[str], bool]:
    """Return names_match as a function of the name, for many modules: it looks names up instead of searching a list."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda name: expression.fullmatch(name) is not None
    entries = frozenset(names or ())
    return lambda name: not entries.isdisjoint(suffixes(name))


def near_misses(entry: str, names: Iterable[str]) -> str:
    """Return a hint with the names that look most like `entry`, or with the first names there are."""
    names = list(names)
    return _did_you_mean(entry, names) or _there_are(list(map(repr, names)), 3)


def near_endings(entry: str, names: Iterable[str]) -> str:
    """Return near_misses, or else the endings of the names with their numbers, most frequent first."""
    names = list(names)
    counts = Counter(_ending(name) for name in names)
    endings = [f"{ending!r} ({count})" if count > 1 else repr(ending) for ending, count in counts.most_common()]
    return _did_you_mean(entry, names) or _there_are(endings, 10)


def most_frequent_ending(names: Iterable[str]) -> str:
    """Return the most frequent ending of names, which can be an entry of target_modules."""
    return Counter(map(_ending, names)).most_common(1)[0][0]


def is_typo(entry: str, names: Iterable[str]) -> bool:
    """Return whether an unknown name is a misspelt one of `names`. Usual names of layers are no misspellings."""
    if entry in USUAL_NAMES:
        return False
    known = {suffix.lower() for name in names for suffix in suffixes(name)}
    same_letters = sorted(entry.lower()) in map(sorted, known)
    return same_letters or bool(difflib.get_close_matches(entry.lower(), known, n=1, cutoff=0.8))


def _did_you_mean(entry: str, names: Iterable[str]) -> str:
    known = {suffix for name in names for suffix in suffixes(name)}
    close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def _there_are(shown: Sequence[str], most: int) -> str:
    return f"; there are {listed(shown, most)}" if shown else "; there are none"


def _ending(name: str) -> str:
    """Return the last segment of a name, with the one before it where the last is a number."""
    return next(ending for ending in reversed(suffixes(name)) if not ending.isdigit() or ending == name)
