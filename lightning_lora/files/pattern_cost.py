"""What it costs to match a pattern in a file: a regular expression can be written so that it never ends.

Python's `re` needs time that grows with the length of a name, at worst as a power of it. The power is the number of
repetitions that can end in several places, such as `.*` or `\\d+`. A repetition inside another repetition has no such
limit and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import LoRAError, shown
from .limits import PATTERN_CHOICES, PATTERN_DEPTH, PATTERN_LENGTH, PATTERN_REPEATS, check

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


def count_steps(pattern: str, names: Iterable[str], path: str, *, of_suffix: bool = False) -> int:
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
