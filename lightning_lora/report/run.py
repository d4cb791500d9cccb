"""Draw an adapter's statistics over a run: a panel for each statistic, a line for each group of layers."""

from __future__ import annotations

import math

from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from .canvas import GREY, Picture, labels
from .conclusions import on_statistics
from .run_log import ALL, Statistics

ACROSS = 2  # panels in a row
PANEL, FRAME, LEGEND_ROW = 1.75, 0.5, 0.19  # inches
MOST_LINES, IN_LEGEND_ROW = 12, 4
LEGEND_WIDTH, KEY_WIDTH = 110, 9  # characters of a row of the legend, and of a line's sample in it
# Grey and Okabe and Ito's colours without yellow, which colour-blind eyes tell apart. In print, dashes and markers do.
COLOURS = (GREY, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "v", "D", "x", "+")
KNOWN = ("norm", "rank", "grad_A", "grad_B", "cosine")  # drawn in this order, before other statistics


def run_picture(statistics: Statistics) -> Picture:
    """Return the picture of what a run logged of its adapter, by step."""
    names = sorted(statistics.series, key=lambda name: (KNOWN.index(name) if name in KNOWN else len(KNOWN), name))
    groups = list(dict.fromkeys(group for series in statistics.series.values() for group in series))
    shown = [group for group in groups if group != ALL][:MOST_LINES] + [group for group in groups if group == ALL]
    texts = labels(shown)
    rows = math.ceil(len(names) / ACROSS)
    across = max(1, min(IN_LEGEND_ROW, LEGEND_WIDTH // (max(map(len, texts)) + KEY_WIDTH)))
    legend_rows = 2 + math.ceil(len(shown) / across)

    def draw(figure: FigureBase) -> None:
        panels = list(figure.subplots(rows, ACROSS, squeeze=False, sharex=True).flat)
        for axes, name in zip(panels, names, strict=False):
            for number, group in enumerate(shown):
                points = statistics.series[name].get(group, ())
                steps, values = [step for step, _ in points], [value for _, value in points]
                axes.plot(
                    steps,
                    values,
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=DASHES[number % len(DASHES)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=3,
                    markevery=max(1, len(points) // 8),
                    linewidth=1.2,
                )
            axes.set_title(name, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(names) - ACROSS) : len(names)]:
            axes.set_xlabel("step")
            axes.xaxis.set_tick_params(labelbottom=True)
        more = f", {len(shown)} of {len(groups)} groups" if len(groups) > len(shown) else ""
        figure.legend(
            panels[0].get_lines(),
            texts,
            title=f"{statistics.source}{more}",
            loc="outside lower center",
            ncols=across,
            fontsize=8,
            frameon=False,
        )

    return Picture(on_statistics(statistics), FRAME + PANEL * rows + LEGEND_ROW * legend_rows, draw)
