"""Arrange layers in a picture: the number in a layer's name is its column, and the end of the name its row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..matching import layer_number

ANY_SEGMENT = (r"[^.]+",)  # the number of a layer may follow any segment
NAMELESS = "layers"  # the projection of names that consist of numbers

Cell = tuple[str, int | None]  # projection (row) and depth (column, None without a number)


def depth_of(name: str) -> int | None:
    """Return the first number among a name's segments, or None without a number."""
    return layer_number(f"layer.{name}.", ANY_SEGMENT)


def projections(names: Iterable[str]) -> dict[str, str]:
    """Return the projection of each layer: the last segment of its name that is no number.

    Where names with the same end differ elsewhere, such as an encoder's and a decoder's, the segments that differ are
    put before it. Layers whose names differ in numbers alone share a projection.
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
    """Return the layers of each cell of a picture. Layers may share a cell, as the experts of one block do."""
    names = list(names)
    shared: dict[Cell, list[str]] = {}
    for name, projection in projections(names).items():
        shared.setdefault((projection, depth_of(name)), []).append(name)
    return shared


@dataclass(frozen=True)
class Grid:
    """Values by projection (rows) and depth (columns)."""

    rows: tuple[str, ...]
    columns: tuple[int | None, ...]  # ascending; None, for layers without a number, is last
    values: tuple[tuple[float, ...], ...]  # by row and column; NaN in a place without a cell
    empty: frozenset[tuple[int, int]]  # row and column of each place without a cell


def arrange(values: Mapping[Cell, float], places: Iterable[Cell] = ()) -> Grid:
    """Return the grid of values, with rows in the order of the cells.

    Args:
        values: one value for each cell.
        places: other cells that get a row and a column too, before those of `values`.
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
    """Return a cell's name for titles."""
    projection, depth = cell
    if depth is None:
        return projection
    return f"layer {depth}" if projection == NAMELESS else f"{projection} of layer {depth}"


def shortened(text: str, longest: int) -> str:
    """Return a text of at most `longest` characters, its middle left out because the end of a name tells most."""
    if len(text) <= longest:
        return text
    head = (longest - 3) // 3
    return f"{text[:head]}...{text[head + 3 - longest :]}"
