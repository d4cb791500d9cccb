"""plot_adapter: draw an adapter, as figures of matplotlib and into a file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..files.atomic import new_file
from ..files.paths import PathLike
from .updates import measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")


def plot_adapter(
    source: PathLike | Mapping[str, Any] | Adapter | nn.Module, *, output: PathLike | None = None
) -> dict[str, Figure]:
    """Draw an adapter: the root mean square of its updates by depth, and their singular values with the effective rank.

    Collective where a model is sharded. The figures do not use pyplot, and no window opens.

    Args:
        source: an injected model, or a PEFT folder, a checkpoint or anything else that load_adapter takes.
        output: a file to write both figures to, below each other: .png, .pdf or .svg. It has no background
            and can lie on a light or a dark page.

    Returns:
        Figures by name: "rms" and "spectra".

    Raises:
        LoRAError: matplotlib is missing, there is nothing to draw, a factor is not finite, or the output cannot be
            written.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> figures = plot_adapter(model, output="adapter.png")
        >>> print(*figures)
        rms spectra
    """
    if not has_matplotlib():
        raise LoRAError("plot_adapter: needs matplotlib; pip install matplotlib.")
    if output is not None and Path(output).suffix.lower() not in SUFFIXES:
        raise LoRAError(f"plot: the output {Path(output).name!r} must end in one of {', '.join(SUFFIXES)}.")
    updates = measure(source)
    from .pictures import figures_of, page_of

    if output is not None:
        with new_file(output) as file:
            page_of(updates).savefig(file, facecolor="none")
    return figures_of(updates)


def has_matplotlib() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None
