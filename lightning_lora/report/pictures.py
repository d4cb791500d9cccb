"""Draw the two pictures of a measured adapter, without pyplot: the size of its updates by depth, and their spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from ..names import cut_at_left
from .depth import places
from .updates import Update, Updates

WIDTH = 8.0  # inches, 960 pixels at DPI; a README shows them in 640 to 800
DPI = 120
LINES = 3.4  # inches
PANEL, FRAME = 1.65, 0.9  # inches of a row of panels, and of everything beside the rows
ACROSS = 4  # panels in a row
MOST_GROUPS = 12
LONGEST = 25  # characters of a group's name
GREY = "#7a7a7a"  # with the same contrast to a light page as to a dark one, as LINE
LINE = "#2a78b8"
# Each has a contrast of 3 and more to a white page and to a dark one. Eyes that do not tell colours apart see markers.
COLOURS = (LINE, "#d55e00", "#009e73", "#c060a0", GREY, "#b27d12", "#8a63d2")
MARKERS = "os^vDX*P"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


@dataclass(frozen=True)
class Picture:
    """A title, a height in inches, and a function that draws into a figure. Every picture is WIDTH wide."""

    title: str
    height: float
    draw: Callable[[FigureBase], None]


def figures_of(updates: Updates) -> dict[str, Figure]:
    """Draw each picture of an adapter into a figure of its own, by name: "rms" and "spectra"."""
    return {name: _drawn([picture]) for name, picture in _pictures(updates).items()}


def page_of(updates: Updates) -> Figure:
    """Draw the pictures of an adapter below each other into one figure."""
    return _drawn([*_pictures(updates).values()])


def _drawn(pictures: Sequence[Picture]) -> Figure:
    """Draw pictures below each other into one figure. The user's matplotlib style is not used."""
    with matplotlib.style.context(["default", STYLE]):
        heights = [picture.height for picture in pictures]
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
        parts: Any = [figure]
        if len(pictures) > 1:
            parts = figure.subfigures(len(pictures), 1, height_ratios=heights)
        for part, picture in zip(parts, pictures, strict=True):
            part.suptitle(picture.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
            picture.draw(part)
    return figure


def _pictures(updates: Updates) -> dict[str, Picture]:
    """Return the pictures of an adapter by name: "rms" and "spectra"."""
    groups: dict[str, dict[int | None, list[Update]]] = {}
    for name, (group, depth) in places(updates.layers).items():
        groups.setdefault(group, {}).setdefault(depth, []).append(updates.layers[name])
    largest = sorted(groups, key=lambda group: -_norm([each for some in groups[group].values() for each in some]))
    shown = {group: depths for group, depths in groups.items() if group in largest[:MOST_GROUPS]}
    of_all = f", the {len(shown)} largest of {len(groups)} groups" if len(shown) < len(groups) else ""
    change = "s B A" if updates.scaled else "B A"
    rows = math.ceil(len(shown) / ACROSS)
    return {
        "rms": Picture(
            f"Root mean square of the updates by depth{of_all}", LINES, lambda figure: _rms(figure, shown, change)
        ),
        "spectra": Picture(
            f"Singular values of the updates{of_all}", FRAME + PANEL * rows, lambda figure: _spectra(figure, shown)
        ),
    }


def _norm(updates: Sequence[Update]) -> float:
    return math.hypot(*(update.norm for update in updates))


def _rms(figure: FigureBase, groups: Mapping[str, Mapping[int | None, Sequence[Update]]], change: str) -> None:
    """Draw the root mean square of each group's updates by depth: a line, or a level for layers without a depth."""
    axes = figure.subplots()
    for number, (group, depths) in enumerate(groups.items()):
        style: Any = {"color": COLOURS[number % len(COLOURS)], "label": cut_at_left(group, LONGEST)}
        sizes = {depth: math.sqrt(sum(update.size for update in some)) for depth, some in depths.items()}
        rms = {depth: _norm(some) / (sizes[depth] or 1.0) for depth, some in depths.items()}
        if None in rms:
            axes.axhline(rms.pop(None), linestyle="--", **style)
        if rms:
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*sorted(rms.items()), strict=True), marker=marker, markersize=5, **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"root mean square of {change}")
    levels = any(None in depths for depths in groups.values())
    axes.set_xlabel("layer number" + "; dashed: layers without one" * levels)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)


def _spectra(figure: FigureBase, groups: Mapping[str, Mapping[int | None, Sequence[Update]]]) -> None:
    """Draw a panel for each group: singular values divided by the largest, their median and range over its layers."""
    rows, columns = math.ceil(len(groups) / ACROSS), min(ACROSS, len(groups))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (group, depths) in zip(panels, groups.items(), strict=False):
        _panel(axes, group, [update for some in depths.values() for update in some])
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.supxlabel("direction; line: median of the layers, band: all; dashed: effective rank", fontsize=9)
    figure.supylabel("singular value / largest", fontsize=9)


def _panel(axes: Axes, group: str, updates: Sequence[Update]) -> None:
    spectra = [spectrum for update in updates for spectrum in update.spectra]
    most, rank = max(map(len, spectra)), mean(rank for update in updates for rank in update.ranks)
    axes.set_title(f"{cut_at_left(group, LONGEST)}\neffective rank {rank:.1f} of {most}")
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlim(0.5, most + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.axvline(rank, color=GREY, linestyle="--", linewidth=0.9)
    table = np.full((len(spectra), most), np.nan)
    for row, spectrum in zip(table, spectra, strict=True):
        row[: len(spectrum)] = np.array(spectrum) / (spectrum[0] or 1.0)
    directions = np.arange(1, most + 1)
    axes.fill_between(directions, np.nanmin(table, 0), np.nanmax(table, 0), color=LINE, alpha=0.3, linewidth=0)
    axes.plot(directions, np.nanmedian(table, 0), color=LINE, marker="o" if most <= 16 else "", markersize=3)
