"""Draw heat maps of one value a layer, by block and group, and the picture of an adapter's update norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import FigureBase

from .canvas import Picture, labels, ticks
from .conclusions import ALIKE, on_norms
from .layout import Column, Grid, arrange, parts_of
from .updates import Updates

COLOURS = "cividis"  # larger values are lighter, so that the map can be read in grey
SIGNED_COLOURS = "RdBu_r"  # for values of both signs: blue, white at zero, red
NO_CELL: Any = {"facecolor": "0.93", "edgecolor": "0.8", "hatch": "////"}
WIDEST_WITH_NUMBERS = 12  # with more columns, numbers do not fit into the cells
LONGEST_LIST = 24  # characters of the name of a list of blocks
AXIS = 72  # characters that have room below the columns
NUMBER_SIZE, LISTS_BELOW = 8.5, 19.0  # points: of numbers in cells, from the map to the names of lists
WITHOUT_BASE = "of the updates alone; with the base, shares of its weights"
ROW, FRAME = 0.29, 1.45  # inches of a row, and of everything beside the rows
ALL_ZERO = 0.01  # the end of the scale where all values are zero
FAR = 2.0  # a value may be nearly so many times the next smaller one, and both have colours of one scale
LIGHT = 0.18  # of this luminance and more, black is easier to read on a colour than white
BEYOND = "\N{BLACK UP-POINTING TRIANGLE}"  # marks a value beyond the end of the colours


@dataclass(frozen=True)
class Scale:
    """The values of a colour scale's ends, and whether the colour map is one for both signs."""

    most: float
    least: float = 0.0
    largest: float = 0.0  # of all values, where some lie beyond `most`
    percent: bool = False
    signed: bool = False

    @property
    def factor(self) -> float:
        """What values are multiplied by before they are shown."""
        return 100.0 if self.percent else 1.0

    def note(self) -> str:
        """Return what the legend says of values beyond the colours, or nothing where all are within."""
        if self.largest <= self.most:
            return ""
        end, largest = (f"{short(value * self.factor)}{'%' * self.percent}" for value in (self.most, self.largest))
        return f"{BEYOND} beyond the colours, which end at {end}: up to {largest}"


def scale_of(*grids: Grid, percent: bool = False) -> Scale:
    """Return one scale for the values of some grids, none of which is negative.

    Beside one layer that moved 100 times as far as the others, the others would all have one colour. So the colours end
    at the largest value that is at most ALIKE times the median, unless the largest of all is less than FAR times that
    one. Zeros do not count.
    """
    values = [value for grid in grids for row in grid.values for value in row if math.isfinite(value) and value > 0]
    if not values:
        return Scale(ALL_ZERO, percent=percent)
    within = [value for value in values if value <= ALIKE * median(values)]
    end, largest = max(within), max(values)
    return Scale(end if largest >= FAR * end else largest, largest=largest, percent=percent)


def norms_picture(updates: Updates) -> Picture:
    """Return the heat map of update norms, relative to the weights' norms where these are known."""
    relative = updates.relative
    grid = arrange(updates.norms(relative=relative))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        scale = scale_of(grid, percent=relative)
        colours = draw_grid(axes, grid, scale, note=scale.note())
        label = norm_label(relative=relative, scaled=updates.scaled)
        colour_bar(figure, colours, [axes], scale, label)
        axes.set_title(updates.source, loc="left")
        if not relative:
            axes.set_title(WITHOUT_BASE, loc="right", fontsize=9)

    return Picture(on_norms(updates), height_of(grid), draw)


def norm_label(*, relative: bool, scaled: bool) -> str:
    """Return the label of a colour bar for norms."""
    change = "s B A" if scaled else "B A"
    return f"|{change}| / |W|, %" if relative else f"rms of {change}"


def height_of(grid: Grid) -> float:
    """Return the height of a heat map in inches."""
    return FRAME + ROW * max(3, len(grid.rows))


def short(value: float) -> str:
    """Return a number in few characters, with an exponent only where it is very small or large."""
    return f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"


def colour_bar(figure: FigureBase, colours: ScalarMappable, beside: Sequence[Axes], scale: Scale, label: str) -> None:
    """Draw the colour bar of some heat maps; it ends in a point where values lie beyond the colours."""
    extend = "max" if scale.note() else "neither"
    size: Any = {"pad": 0.01, "aspect": 15 * len(beside), "extendfrac": 0.05 / len(beside)}
    figure.colorbar(colours, ax=beside, label=label, extend=extend, **size)


def draw_grid(
    axes: Axes,
    grid: Grid,
    scale: Scale,
    *,
    xlabel: bool = True,
    note: str = "",
    text: Callable[[float], str] = short,
) -> ScalarMappable:
    """Draw a heat map: hatched where no layer is, with a cross where a value is not finite.

    Args:
        axes: what to draw into.
        grid: the values.
        scale: what the colours mean.
        xlabel: say below the map that columns are numbers of layers.
        note: what the legend below the map says besides.
        text: writes a value into a cell.

    Returns:
        The image, for a colour bar; its array holds the values as drawn.
    """
    values = np.array(grid.values) * scale.factor
    shown = np.ma.masked_invalid(values)
    axes.patch.set(**NO_CELL)
    colours = SIGNED_COLOURS if scale.signed else COLOURS
    ends: Any = {"vmin": scale.least * scale.factor, "vmax": scale.most * scale.factor}
    image = axes.imshow(shown, cmap=colours, **ends, aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(~np.isfinite(values)):
        if (row, column) not in grid.empty:
            axes.plot(column, row, marker="x", color="black", markersize=5)
    axes.set_yticks(range(len(grid.rows)), labels(grid.rows))
    numbered = _draw_columns(axes, grid.columns)
    axes.set_xlabel("; ".join(filter(None, ["layer number" if xlabel and numbered else "", note])))
    _write_values(axes, shown, image, text if len(grid.columns) <= WIDEST_WITH_NUMBERS else None)
    return image


def _draw_columns(axes: Axes, columns: Sequence[Column]) -> bool:
    """Write numbers below columns, and below these the names of lists of blocks. Return whether there are numbers."""
    if all(column is None for column in columns):
        axes.set_xticks([])
        return False
    spans: dict[tuple[str, bool], list[int]] = {}  # places by list
    for place, column in enumerate(columns):
        spans.setdefault((parts_of(column)[0], column is None), []).append(place)
    places_shown = [places[i] for places in spans.values() for i in ticks(len(places), len(columns))]
    axes.set_xticks(places_shown, [parts_of(columns[place])[1] for place in places_shown])
    named = {name: places for (name, _), places in spans.items() if name}
    shown = dict(zip(named, labels([*named], LONGEST_LIST), strict=True))
    crowded = any(len(shown[name]) > len(places) / len(columns) * AXIS for name, places in named.items())
    texts = ["\n" * (crowded and number % 2) + name for number, name in enumerate(shown.values())]
    axes.set_xticks([(places[0] + places[-1]) / 2 for places in named.values()], texts, minor=True)
    axes.tick_params("x", which="minor", length=0, pad=LISTS_BELOW)
    for places in [*named.values()][1:]:
        axes.axvline(places[0] - 0.5, color="white", linewidth=2)
    return True


def _write_values(axes: Axes, values: Any, image: Any, text: Callable[[float], str] | None) -> None:
    """Write each value into its cell, or only mark those beyond the colours where there is no room for text."""
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        if not math.isfinite(value):
            continue
        beyond = BEYOND if value > image.norm.vmax * (1 + 1e-9) else ""
        written = f"{text(float(value))}{beyond}" if text else beyond
        if written:
            colour = "black" if _luminance(image.cmap(float(image.norm(value)))) > LIGHT else "white"
            axes.text(column, row, written, ha="center", va="center", fontsize=NUMBER_SIZE, color=colour)


def _luminance(colour: tuple[float, ...]) -> float:
    """Return the relative luminance of a colour, as WCAG defines it."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
