"""The one error type of the package, and the kind of it that a Trainer can go on after."""

from __future__ import annotations

from .texts import readable


class LoRAError(ValueError):
    """Says where it went wrong, what was expected, what was found and what to do about it.

    Names in it may come from any file: control characters are shown, and no name is quoted at full length.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(readable(each) if isinstance(each, str) else each for each in args))


def sentence(text: object) -> str:
    """Return a text, as what another program said, with a full stop where it has no end."""
    said = str(text)
    return said if said.endswith((".", "?", "!")) else f"{said}."


class NonFiniteError(LoRAError):
    """A layer cannot be merged because W' holds NaN or Inf, or is beyond the range of its dtype."""


class UnknownOptionError(LoRAError, TypeError):
    """A keyword is given that there is not; a TypeError too, as Python's own is."""
