"""The one error type of the package."""

from __future__ import annotations


class LoRAError(ValueError):
    """Says where it went wrong, what was expected, what was found and what to do about it."""
