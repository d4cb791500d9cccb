"""Where a layer's value stands in a picture: by the number in its name, and by how the name ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..matching import layer_number

ANY_SEGMENT = (r"[^.]+",)  # that the number of a layer may follow

NAMELESS = "layers"  # the projection of names that are numbers alone

Cell = tuple[str, int | None]  # projection and depth


def depth_of(name: str) -> int | None:
    """Return the first number among a name's segments, or None."""
    return layer_number(f"layer.{name}.", ANY_SEGMENT)


def projections(names: Iterable[str]) -> dict[str, str]:
    """Return what layers that differ in numbers alone have in common: the last segment that is none.

    Where other names end alike, as an encoder's and a decoder's do, the segments that tell them apart stand before it.
    """
    templates = {name: _without_numbers(name) for name in names}
    same_ending: dict[str, list[tuple[str, ...]]] = {}
    for template in dict.fromkeys(templates.values()):
        same_ending.setdefault(template[-1], []).append(template)
    labels = {}
    for ending, alike in same_ending.items():
        common = set.intersection(*map(set, alike))
        for template in alike:
            labels[template] = ".".join([*(part for part in template[:-1] if part not in common), ending])
    return {name: labels[template] for name, template in templates.items()}


def _without_numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part and not part.isdigit()) or (NAMELESS,)


def cells(names: Iterable[str]) -> dict[Cell, list[str]]:
    """Return which layers share a cell of a picture, as the experts of one block do."""
    names = list(names)
    shared: dict[Cell, list[str]] = {}
    for name, projection in projections(names).items():
        shared.setdefault((projection, depth_of(name)), []).append(name)
    return shared


@dataclass(frozen=True)
class Grid:
    """Values by projection (rows) and depth (columns)."""

    rows: tuple[str, ...]
    columns: tuple[int | None, ...]  # ascending; layers without a number last
    values: tuple[tuple[float, ...], ...]  # NaN and infinity where there is a cell, NaN where there is none
    empty: frozenset[tuple[int, int]]  # row and column where there is none


def arrange(values: Mapping[Cell, float], places: Iterable[Cell] = ()) -> Grid:
    """Return the grid of one value a cell, rows in their order.

    Args:
        values: of the cells.
        places: other cells for which there is to be a row and a column, before these.
    """
    places = [*places, *values]
    rows = tuple(dict.fromkeys(row for row, _ in places))
    numbers = sorted({column for _, column in places if column is not None})
    columns = (*numbers, *([None] if any(column is None for _, column in places) else []))
    return Grid(
        rows,
        columns,
        tuple(tuple(values.get((row, column), math.nan) for column in columns) for row in rows),
        frozenset(
            (i, j) for i, row in enumerate(rows) for j, column in enumerate(columns) if (row, column) not in values
        ),
    )


def cell_name(cell: Cell) -> str:
    """Return the words for a cell, for titles."""
    projection, depth = cell
    if depth is None:
        return projection
    return f"layer {depth}" if projection == NAMELESS else f"{projection} of layer {depth}"


def shortened(text: str, longest: int) -> str:
    """Return a text with its middle left out where it is long: the end of a name tells most."""
    if len(text) <= longest:
        return text
    head = (longest - 3) // 3
    return f"{text[:head]}...{text[head + 3 - longest :]}"
