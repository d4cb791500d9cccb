"""The package's errors, and values as texts for messages."""

from __future__ import annotations

import reprlib

MOST = 200  # characters of a value in a message


class LoRAError(ValueError):
    """Any error that this package raises on purpose.

    The message says where the trouble is, what was expected, what was found and what to do.

    Example::

        >>> try:
        ...     LoRAConfig(r=0)
        ... except LoRAError as error:
        ...     print(error)
        LoRAConfig: r must be a whole number of at least 1, but it is 0.
    """


class NonFiniteError(LoRAError):
    """A layer cannot be merged because W' holds NaN or Inf, or is beyond the range of its dtype."""


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


def _shown_number(value: int) -> str:
    try:
        return repr(value)  # uncut: digits in the middle of a number count
    except ValueError:
        return "a number with more digits than Python writes"
