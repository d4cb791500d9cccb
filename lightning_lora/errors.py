"""The package's errors, and texts of any origin made fit for a message.

Names come from files that anybody may have written. In messages control characters are shown as escapes, and long names
are cut in the middle.
"""

from __future__ import annotations

import re
import reprlib

MOST = 200  # characters of a name or a value in a message
TAIL = 60  # how many of them are the last ones of a long name: names in one model differ at their ends
PUNCTUATION = ".,;:)]"
QUOTED = re.compile(
    r"""(?<![\w\\])(?:'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")"""
)  # as repr writes names
UNBROKEN = re.compile(rf"""[^\s/'"]{{{MOST + 1},}}""")  # long words: names without quotes, parts of paths


class LoRAError(ValueError):
    """Any error that this package raises on purpose.

    The message says where the trouble is, what was expected, what was found and what to do. Names in it may come from
    any file: control characters are shown, and no name is quoted at full length.

    Example::

        >>> try:
        ...     LoRAConfig(r=0)
        ... except LoRAError as error:
        ...     print(error)
        LoRAConfig: r must be a whole number of at least 1, but it is 0.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(readable(each) if isinstance(each, str) else each for each in args))


def sentence(text: object) -> str:
    """Return a text, such as another program's message, with a full stop where it has no end.

    Of an error without a message, as EOFError of an empty file, return its name.
    """
    said = str(text) or (type(text).__name__ if isinstance(text, BaseException) else "")
    return said if said.endswith((".", "?", "!")) else f"{said}."


def shown(value: object, most: int = MOST) -> str:
    """Return a value for a message: its repr, cut to `most` characters. Takes no time for huge or nested values."""
    if isinstance(value, int):
        return _shown_number(value)
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxset, short.maxfrozenset, short.maxdict = 4, 8, 8, 8, 8, 8
    short.maxstring = short.maxlong = short.maxother = most
    try:
        text = short.repr(value)
    except Exception:  # an object's own repr
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[: most - 3]}..."


class NonFiniteError(LoRAError):
    """A layer cannot be merged because W' holds NaN or Inf, or is beyond the range of its dtype."""


class UnknownOptionError(LoRAError, TypeError):
    """An unknown keyword was given. This is a TypeError too, as Python's own error for that is."""


def printable(text: str, kept: str = "") -> str:
    """Replace control characters, lone surrogates and the like by escapes, as repr writes them.

    Args:
        text: of any origin.
        kept: control characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in kept else repr(each)[1:-1] for each in text)


def shortened(name: str, quote: str = "") -> str:
    """Return a name in `quote`. Of a long name return its begin, its end and its length."""
    if len(name) <= MOST:
        return f"{quote}{name}{quote}"
    return f"{quote}{name[: MOST - TAIL - 3]}...{name[-TAIL:]}{quote} ({len(name):,} characters)"


def readable(message: str) -> str:
    """Return a message with control characters shown and long names cut. Line breaks stay."""
    return UNBROKEN.sub(_shortened_word, QUOTED.sub(_shortened_quoted, printable(message, kept="\n")))


def one_line(message: str) -> str:
    """Return a readable message in a single line."""
    return readable(" ".join(message.split("\n")))


def _shown_number(value: int) -> str:
    try:
        return repr(value)  # uncut: digits in the middle of a number count
    except ValueError:
        return "a number with more digits than Python writes"


def _shortened_quoted(found: re.Match[str]) -> str:
    quote, inside = found[0][0], found[0][1:-1]
    return found[0] if len(inside) <= MOST else shortened(inside, quote)


def _shortened_word(found: re.Match[str]) -> str:
    word = found[0].rstrip(PUNCTUATION) or found[0]
    rest = found[0][len(word) :][:3]
    return found[0] if word.isdecimal() else shortened(word) + rest  # numbers stay whole
