"""The one error type of the package, and the kind of it that a Trainer can go on after."""

from __future__ import annotations


class LoRAError(ValueError):
    """Says where it went wrong, what was expected, what was found and what to do about it."""


class NonFiniteError(LoRAError):
    """A layer cannot be merged because W' holds NaN or Inf, or is beyond the range of its dtype."""
