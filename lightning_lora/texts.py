"""Texts that files bring along, made fit to be shown: control characters as escapes, and long names cut."""

from __future__ import annotations

import re

MOST = 200  # characters of a name in a message
TAIL = 60  # of these, how many are its last ones, which tell names of one model apart
# A quoted text, as repr writes it, or what no space or slash divides: names, but not whole paths.
NAMES = re.compile(rf"""(?<![\w\\])(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|[^\s/'"]{{{MOST + 1},}}""")


def printable(text: str, kept: str = "") -> str:
    """Return a text with escapes, as repr writes them, for control characters, lone surrogates and the like.

    Args:
        text: of any origin.
        kept: characters that stay as they are all the same.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in kept else repr(each)[1:-1] for each in text)


def shortened(name: str) -> str:
    """Return a name whole, or the begin and the end of a long one and how long it is."""
    if len(name) <= MOST:
        return name
    return f"{name[: MOST - TAIL - 3]}...{name[-TAIL:]} ({len(name):,} characters)"


def readable(message: str) -> str:
    """Return a message with control characters shown, but line breaks, and no more than MOST characters of any name."""
    return NAMES.sub(_shortened_name, printable(message, kept="\n"))


def one_line(message: str) -> str:
    """Return a readable message in a single line."""
    return readable(" ".join(message.split("\n")))


def _shortened_name(found: re.Match[str]) -> str:
    name, quote = found[0], found[0][0] if found[0][0] in "'\"" else ""
    inside = name[1:-1] if quote else name
    if len(inside) <= MOST:
        return name
    text, _, length = shortened(inside).rpartition(" (")
    return f"{quote}{text}{quote} ({length}"
