"""What a model, an adapter in memory and a file say of each adapter that is attached beside the trained one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attachment:
    """An adapter that is attached beside the trained one.

    Attributes:
        strength: by which it is multiplied.
        fingerprint: a digest of its factors and scalings, which tells it from another adapter of the same name.
    """

    strength: float
    fingerprint: str
