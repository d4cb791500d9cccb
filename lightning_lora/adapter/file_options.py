"""Limits on the options in a file: patterns are regular expressions, which can be written so that they never end.

Python's `re` needs time that grows with the length of a name, at worst as a power of it. The power is the number of
repetitions that can end in several places, such as `.*` or `\\d+`. A repetition inside another repetition has no such
limit and is refused.

A user's own code may have any pattern. readable_options makes sure that the saved options can be read again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..files.limits import (
    PATTERN_CHOICES,
    PATTERN_DEPTH,
    PATTERN_LENGTH,
    PATTERN_REPEATS,
    PATTERN_STEPS,
    PATTERNS,
    check,
    check_names,
)
from ..matching import matcher
from .adapter import Adapter
from .layer_options import exact_options

TOGETHER = 1000  # names in one pattern
EXPRESSIONS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")  # where they are one text
BY_LAYER = ("rank_pattern", "alpha_pattern")
# What a group matched is matched again; a comment; other rules of reading.
REFUSED = re.compile(r"\(\?(P=|\(|#|[a-zA-Z]*x)")
AGAIN = "has comments or matches again what it matched, which a file may not ask for; name the modules."


@dataclass
class _Group:
    """Count the repetitions in a group of a regular expression while it is read from left to right."""

    widest: int = 0  # repetitions after each other
    total: int = 0  # ways to match at one place
    texts: list[str | None] = field(default_factory=list)  # of alternatives that are plain text
    repeats: int = 0
    choices: int = 1
    text: str | None = ""
    last_repeats: int = 0
    last_choices: int = 1
    last_varies: bool = False

    def add(self, text: str | None, repeats: int = 0, choices: int = 1, *, varies: bool = False) -> None:
        """Put a part behind the others."""
        self.repeats += repeats
        self.choices *= choices
        self.text = None if text is None or self.text is None else self.text + text
        self.last_repeats, self.last_choices, self.last_varies = repeats, choices, varies

    def begin_alternative(self) -> None:
        """Begin another alternative."""
        self.widest, self.total = max(self.widest, self.repeats), self.total + self.choices
        self.texts.append(self.text)
        self.repeats, self.choices, self.text = 0, 1, ""

    def close(self) -> tuple[int, int, bool]:
        """Return the repetitions after each other, the ways to match at one place, and whether it has alternatives."""
        self.begin_alternative()
        texts = [text for text in self.texts if text is not None]
        ways = _longest_chain(texts) if len(texts) == len(self.texts) else self.total
        return self.widest, ways, len(self.texts) > 1


def _longest_chain(texts: Iterable[str]) -> int:
    """Return how many of some texts can match at one place: the longest chain in which each begins with the last."""
    chain: list[str] = []
    longest = 0
    for text in sorted(texts):
        while chain and not text.startswith(chain[-1]):
            chain.pop()
        chain.append(text)
        longest = max(longest, len(chain))
    return longest


def readable_options(adapter: Adapter) -> LoRAConfig | None:
    """Return an adapter's options for a file: patterns that its reader would refuse give way to the layers' names."""
    config, scalings = adapter.config, adapter.scalings
    if config is None or _can_be_read(config, scalings):
        return config
    ranks = adapter.ranks() or {name: config.rank(name) for name in scalings}  # a live model's come without tensors
    is_parameter = matcher(config.target_parameters)
    exact = exact_options(config, ranks, scalings, list(filter(is_parameter, ranks)))
    own = {name: getattr(config, name) for name in ("r", "lora_alpha", *BY_LAYER)}
    grouped: dict[str, Any] = {name: _grouped(getattr(exact, name) or {}) for name in BY_LAYER}
    choices = (replace(exact, **own), exact, replace(exact, **grouped))
    return next((choice for choice in choices if _can_be_read(choice, scalings)), exact)


def _can_be_read(config: LoRAConfig, names: Collection[str]) -> bool:
    try:
        check_options(config.to_dict(), names, "options")
    except LoRAError:
        return False
    return True


def _grouped(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Join patterns that have the same value, up to a thousand in one pattern. Each of them begins with ^."""
    by_value: dict[Any, list[str]] = {}
    for pattern, value in patterns.items():
        by_value.setdefault(value, []).append(pattern.removeprefix("^"))
    return {
        f"^(?:{'|'.join(names[start : start + TOGETHER])})": value
        for value, names in by_value.items()
        for start in range(0, len(names), TOGETHER)
    }


def check_options(options: Any, names: Collection[str], path: object) -> None:
    """Raise LoRAError where options in a file could take long to apply.

    Args:
        options: the options, as the file has them.
        names: the layers in the file.
        path: the file, for messages.
    """
    if not isinstance(options, Mapping):
        return
    check_names(names, path)
    steps = 0
    for option in EXPRESSIONS:
        value = options.get(option)
        if isinstance(value, str):
            steps += _steps(value, names, f"{path}: {option}")
        elif isinstance(value, (list, tuple, set, frozenset)):
            check_names(filter(_is_text, value), f"{path}: {option}")
    for option in BY_LAYER:
        value = options.get(option)
        if isinstance(value, Mapping):
            check(PATTERNS, len(value), f"{path}: {option}")
            steps += sum(_steps(k, names, f"{path}: {option}", of_suffix=True) for k in value if isinstance(k, str))
    value = options.get("layers_pattern")
    patterns = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
    check(PATTERNS, len(patterns), f"{path}: layers_pattern")
    steps += sum(_steps(entry, names, f"{path}: layers_pattern") for entry in filter(_is_text, patterns))
    check(PATTERN_STEPS, steps, path)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _steps(pattern: str, names: Iterable[str], path: str, *, of_suffix: bool = False) -> int:
    """Estimate how many steps it takes to compare names with a pattern; with of_suffix, each dotted suffix too."""
    repeats, choices = count_repeats(pattern, path)
    return sum(math.comb(len(name) + repeats, repeats) * choices * (name.count(".") * of_suffix + 1) for name in names)


def count_repeats(pattern: str, path: str) -> tuple[int, int]:
    """Return how many repetitions follow each other in a regular expression, and the ways to match at one place.

    Raises:
        LoRAError: it repeats what repeats itself, or has other parts whose time has no bound.
    """
    check(PATTERN_LENGTH, len(pattern), path)
    groups = [_Group()]
    at = 0
    while at < len(pattern):
        character, group = pattern[at], groups[-1]
        if character == "(":
            if REFUSED.match(pattern, at):
                raise LoRAError(f"{path}: {shown(pattern)} {AGAIN}")
            groups.append(_Group())
            check(PATTERN_DEPTH, len(groups), path)
            at = _after_group_start(pattern, at)
        elif character == ")" and len(groups) > 1:
            repeats, choices, varies = groups.pop().close()
            groups[-1].add(None, repeats, choices, varies=varies)
            at += 1
        elif character == "|":
            group.begin_alternative()
            at += 1
        elif character in "*+?{":
            at = _quantified(group, pattern, at, path)
        else:
            end = _after_part(pattern, at, path)
            part = pattern[at:end].removeprefix("\\")
            is_text = len(part) == 1 and (not part.isalnum() if end - at == 2 else part not in ".^$")
            group.add(part if is_text else None)
            at = end
        check(PATTERN_CHOICES, groups[-1].choices, path)
    while len(groups) > 1:  # a group that is not closed; LoRAConfig refuses it
        groups[-2].add(None, *groups.pop().close()[:2])
    repeats, choices, _ = groups[0].close()
    check(PATTERN_REPEATS, repeats, path)
    check(PATTERN_CHOICES, choices, path)
    return repeats, choices


def _quantified(group: _Group, pattern: str, at: int, path: str) -> int:
    """Read a quantifier of the last part. Returns where it ends."""
    end, once = at + 1, pattern[at] == "?"
    if pattern[at] == "{":
        end = pattern.find("}", at) + 1
        if not end or not all(each in "0123456789," for each in pattern[at + 1 : end - 1]):
            group.add("{")
            return at + 1
        once = pattern[at:end] in ("{0,1}", "{,1}", "{1}")
    group.text = None
    if once:
        group.choices = group.choices // group.last_choices * (group.last_choices + 1)
        group.last_choices += 1
    elif group.last_repeats or group.last_choices > 1 or group.last_varies:
        raise LoRAError(
            f"{path}: {shown(pattern)} repeats a group that has repetitions or alternatives in it. From a file such a "
            "pattern is not taken, for it may never end; name the modules, or write it without."
        )
    else:
        group.repeats, group.last_repeats = group.repeats + 1, 1
    return end + (pattern[end : end + 1] in ("?", "+"))


def _after_group_start(pattern: str, at: int) -> int:
    """Return where a group's content begins."""
    if not pattern.startswith("(?", at):
        return at + 1
    if pattern.startswith("(?P<", at):
        return pattern.find(">", at) + 1 or len(pattern)
    at += 2
    while at < len(pattern) and pattern[at] in "aiLmsux-":
        at += 1
    while at < len(pattern) and pattern[at] in ":=!<>":
        at += 1
    return at


def _after_part(pattern: str, at: int, path: str) -> int:
    """Return where a character, an escape or a class of characters ends."""
    if pattern[at] == "\\":
        if pattern[at + 1 : at + 2].isdigit() and pattern[at + 1] != "0":
            raise LoRAError(f"{path}: {shown(pattern)} {AGAIN}")
        return at + 2
    if pattern[at] != "[":
        return at + 1
    at += 2 if pattern.startswith("[^", at) else 1
    at += pattern.startswith("]", at)
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
