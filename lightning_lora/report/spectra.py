"""Draw the singular values of an adapter's updates, in one panel for each group of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from .canvas import GREY, Picture, labels
from .conclusions import half_text, held_text, median_share, on_spectra
from .updates import Updates

ACROSS = 4  # panels in a row
MOST_PANELS = 12
LONGEST = 22  # characters of a group's name
MOST_MARKERS = 16  # on a line
LINE = "#2a78b8"  # of the median; the band has it too
PANEL, FRAME = 1.65, 0.9  # inches of a row of panels, and of everything beside the rows


def spectra_picture(updates: Updates) -> Picture:
    """Return the picture of singular values divided by the largest: median and range over a group's layers."""
    by_group: dict[str, list[tuple[float, ...]]] = {}
    for (group, _), names in updates.cells.items():
        spectra = (spectrum for name in names for spectrum in updates.layers[name].spectra)
        by_group.setdefault(group, []).extend(spectra)
    largest_first = sorted(by_group, key=lambda name: -_energy(by_group[name]))[:MOST_PANELS]
    shown = [name for name in by_group if name in largest_first]
    rows = math.ceil(len(shown) / ACROSS)

    def draw(figure: FigureBase) -> None:
        panels = list(figure.subplots(rows, min(ACROSS, len(shown)), squeeze=False, sharey=True).flat)
        for axes, name, label in zip(panels, shown, labels(shown, LONGEST), strict=False):
            _draw_panel(axes, label, by_group[name])
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        hidden = len(by_group) - len(shown)
        more = f"the {len(shown)} largest of {len(by_group)} projections; " if hidden else ""
        figure.supxlabel(
            f"{more}direction; line: median of the layers, band: all; dashed: half of the directions", fontsize=9
        )
        figure.supylabel("singular value / largest", fontsize=9)

    return Picture(on_spectra(updates), FRAME + PANEL * rows, draw)


def _energy(spectra: Sequence[tuple[float, ...]]) -> float:
    energy = math.fsum(value**2 for spectrum in spectra for value in spectrum)
    return energy if math.isfinite(energy) else math.inf


def _draw_panel(axes: Axes, label: str, spectra: Sequence[tuple[float, ...]]) -> None:
    rank = max(map(len, spectra))
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlim(0.5, rank + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    finite = [spectrum for spectrum in spectra if max(spectrum) > 0 and all(map(math.isfinite, spectrum))]
    share = median_share(finite)
    held = f"{half_text(sorted(set(map(len, finite))))} hold {held_text(share)}" if math.isfinite(share) else ""
    axes.set_title(f"{label}\n{held}", loc="left", fontsize=9)
    if not finite:
        axes.text(0.5, 0.5, "zero or not finite", transform=axes.transAxes, ha="center", va="center")
        return
    table = np.full((len(finite), rank), np.nan)
    for row, spectrum in zip(table, finite, strict=True):
        row[: len(spectrum)] = np.array(spectrum) / max(spectrum)
    directions = np.arange(1, rank + 1)
    axes.fill_between(directions, np.nanmin(table, 0), np.nanmax(table, 0), color=LINE, alpha=0.3, linewidth=0)
    axes.plot(directions, np.nanmedian(table, 0), color=LINE, marker="o" if rank <= MOST_MARKERS else "", markersize=3)
    if rank > 1:
        axes.axvline((rank + 1) // 2 + 0.5, color=GREY, linestyle="--", linewidth=0.9)
