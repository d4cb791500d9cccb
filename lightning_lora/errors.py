"""The one error type of the package, and the kind of it that a Trainer can go on after."""

from __future__ import annotations

import reprlib

MOST_SHOWN = 200  # characters of a value out of a file


class LoRAError(ValueError):
    """Says where it went wrong, what was expected, what was found and what to do about it."""


def sentence(text: object) -> str:
    """Return a text, as what another program said, with a full stop where it has no end."""
    said = str(text)
    return said if said.endswith((".", "?", "!")) else f"{said}."


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """Return a value for a message as repr does, but short and at once, however long or nested it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxset, short.maxfrozenset, short.maxdict = 4, 8, 8, 8, 8, 8
    short.maxstring = short.maxlong = short.maxother = most
    try:
        text = short.repr(value)
    except Exception:  # an object's own repr, or a number with more digits than Python writes
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[: most - 3]}..."


class NonFiniteError(LoRAError):
    """A layer cannot be merged because W' holds NaN or Inf, or is beyond the range of its dtype."""


class UnknownOptionError(LoRAError, TypeError):
    """A keyword is given that there is not; a TypeError too, as Python's own is."""
