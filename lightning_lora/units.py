"""Sizes as text for people."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Return a number of bytes as text for people, such as 1.5 MB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"
