"""Draw heat maps of one value a layer, by depth and projection, and the picture of an adapter's update norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import FigureBase

from .canvas import Picture, labels, ticks
from .conclusions import on_norms
from .layout import Grid, arrange
from .updates import Updates

COLOURS = "cividis"  # larger values are lighter, so that the map can be read in grey
NO_CELL = "0.88"
WIDEST_WITH_NUMBERS = 12  # with more columns, numbers do not fit into the cells
ROW, FRAME = 0.26, 1.35  # inches of a row, and of everything beside the rows
ALL_ZERO = 0.01  # the end of the scale where all values are zero


def norms_picture(updates: Updates) -> Picture:
    """Return the heat map of update norms, relative to the weights' norms where these are known."""
    relative = updates.relative
    grid = arrange(updates.norms(relative=relative))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        colours = draw_grid(axes, grid, largest(grid), percent=relative)
        figure.colorbar(
            colours, ax=axes, label=norm_label(relative=relative, scaled=updates.scaled), pad=0.01, aspect=15
        )
        axes.set_title(updates.source, loc="left", color="0.35")

    return Picture(on_norms(updates), height_of(grid), draw)


def norm_label(*, relative: bool, scaled: bool) -> str:
    """Return the label of a colour bar for norms."""
    change = "s B A" if scaled else "B A"
    return f"|{change}| / |W|, %" if relative else f"rms of {change}"


def height_of(grid: Grid) -> float:
    """Return the height of a heat map in inches."""
    return FRAME + ROW * max(3, len(grid.rows))


def largest(*grids: Grid) -> float:
    """Return the largest finite value in some grids, for a common scale."""
    values = [value for grid in grids for row in grid.values for value in row if math.isfinite(value)]
    return max(values, default=0.0) or ALL_ZERO


def short(value: float) -> str:
    """Return a number in few characters, with an exponent only where it is very small or large."""
    return f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"


def draw_grid(
    axes: Axes,
    grid: Grid,
    most: float,
    least: float = 0.0,
    *,
    percent: bool = False,
    xlabel: bool = True,
    text: Callable[[float], str] = short,
) -> ScalarMappable:
    """Draw a heat map: grey where no layer is, with a cross where a value is not finite.

    Returns:
        The image, for a colour bar; its array holds the values as drawn.
    """
    factor = 100.0 if percent else 1.0
    values = np.array(grid.values) * factor
    shown = np.ma.masked_invalid(values)
    axes.set_facecolor(NO_CELL)
    image = axes.imshow(
        shown, cmap=COLOURS, vmin=least * factor, vmax=most * factor, aspect="auto", interpolation="nearest"
    )
    for row, column in np.argwhere(~np.isfinite(values)):
        if (row, column) not in grid.empty:
            axes.plot(column, row, marker="x", color="black", markersize=5)
    axes.set_yticks(range(len(grid.rows)), labels(grid.rows))
    names = ["other" if number is None else str(number) for number in grid.columns]
    places = ticks(len(names))
    axes.set_xticks(places, [names[place] for place in places])
    if xlabel:
        axes.set_xlabel("layer number")
    if len(grid.columns) <= WIDEST_WITH_NUMBERS:
        _write_values(axes, shown, image.norm, text)
    return image


def _write_values(axes: Axes, values: Any, norm: Any, text: Callable[[float], str]) -> None:
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        if math.isfinite(value):
            colour = "black" if float(norm(value)) > 0.55 else "white"
            axes.text(column, row, text(float(value)), ha="center", va="center", fontsize=7, color=colour)
