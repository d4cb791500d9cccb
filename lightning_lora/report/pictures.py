"""The pictures of one adapter, and a check that matplotlib is there to draw them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import LoRAError
from .updates import Updates

if TYPE_CHECKING:
    from .canvas import Picture


def has_matplotlib() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib(subject: str) -> None:
    """Raise LoRAError where matplotlib is not installed."""
    if not has_matplotlib():
        raise LoRAError(f"{subject}: needs matplotlib; pip install matplotlib.")


def pictures_of(updates: Updates) -> dict[str, Picture]:
    """Return the pictures of one adapter by name: "norms" and "spectra". It needs matplotlib."""
    from .heat_map import norms_picture
    from .spectra import spectra_picture

    return {"norms": norms_picture(updates), "spectra": spectra_picture(updates)}
