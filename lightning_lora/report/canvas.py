"""Draw pictures without pyplot, each into a figure of its own or several below each other into one figure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure, FigureBase

from ..names import cut_at_left

WIDTH = 8.0  # inches, 960 pixels at DPI; a README shows them in 640 to 800
DPI = 120
TITLE_WIDTH = 88  # characters of a title's line
LONGEST = 28  # characters of a name beside an axis
MOST_TICKS = 16
GREY = "#7a7a7a"  # with the same contrast to a light page as to a dark one
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
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


def to_figure(picture: Picture) -> Figure:
    """Draw one picture into a figure of its own."""
    return to_page([picture])


def to_page(pictures: Sequence[Picture]) -> Figure:
    """Draw pictures below each other into one figure. The user's matplotlib style is not used."""
    with matplotlib.style.context(["default", STYLE]):
        heights = [picture.height for picture in pictures]
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
        parts: Any = [figure]
        if len(pictures) > 1:
            parts = figure.subfigures(len(pictures), 1, height_ratios=heights)
        for part, picture in zip(parts, pictures, strict=True):
            lines = textwrap.fill(picture.title, TITLE_WIDTH)
            part.suptitle(lines, x=0.01, ha="left", fontsize=11, fontweight="bold")
            picture.draw(part)
    return figure


def labels(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Return names that fit beside an axis or above a panel."""
    return [cut_at_left(name, longest) for name in names]


def ticks(count: int, whole: int | None = None) -> list[int]:
    """Return the places among `count` that get a label, so that an axis of `whole` places has about MOST_TICKS."""
    step = -(-(whole or count) // MOST_TICKS)
    return [place for place in range(0, count, step) if place == 0 or whole is None or count - place > step // 2]
