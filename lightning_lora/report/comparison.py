"""Draw two adapters: the norms of each adapter's updates, and the cosine between the updates."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import FigureBase

from ..errors import LoRAError
from .canvas import Picture
from .conclusions import cosine_text, on_comparison
from .heat_map import ROW, Scale, colour_bar, draw_grid, norm_label, scale_of
from .layout import arrange
from .updates import Updates, cosines

FRAME = 2.4  # inches around the rows of the three heat maps


def comparison_picture(first: Updates, second: Updates) -> Picture:
    """Return a picture of three heat maps: the update norms of each adapter on one scale, and the cosines.

    Raises:
        LoRAError: the adapters have no layer in common.
    """
    first, second = replace(first, beside=tuple(second.layers)), replace(second, beside=tuple(first.layers))
    found = cosines(first, second)
    if not found:
        raise LoRAError(
            f"plot: {first.source} and {second.source} have no layer in common; their first layers are "
            f"{next(iter(first.layers))!r} and {next(iter(second.layers))!r}. Give two adapters of one model."
        )
    relative = first.relative and second.relative
    places = [*first.cells, *second.cells]
    grids = [arrange(each.norms(relative=relative), places) for each in (first, second)]
    angles = arrange(found, places)

    def draw(figure: FigureBase) -> None:
        panels = figure.subplots(3, 1)
        scale = scale_of(*grids, percent=relative)
        for axes, grid, updates, place in zip(panels, grids, (first, second), ("first", "second"), strict=False):
            note = scale.note() if place == "second" else ""
            colours = draw_grid(axes, grid, scale, xlabel=False, note=note)
            axes.set_title(f"{place}: {updates.source}", loc="left")
        label = norm_label(relative=relative, scaled=first.scaled and second.scaled)
        colour_bar(figure, colours, panels[:2], scale, label)
        both_signs = Scale(1.0, -1.0, signed=True)
        colours = draw_grid(panels[2], angles, both_signs, text=cosine_text)
        panels[2].set_title("cosine between the two updates", loc="left")
        colour_bar(figure, colours, panels[2:], both_signs, "cosine")

    return Picture(on_comparison(first, second, found), FRAME + 3 * ROW * max(3, len(angles.rows)), draw)
