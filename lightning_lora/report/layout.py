"""Arrange layers in a picture: the group of a layer is its row, and the numbered block that it lies in its column."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..names import NAMELESS, group_of

Column = int | str | None  # a block's number; with its list or its second number ("decoder 3", "4.1"); None for neither
Cell = tuple[str, Column]  # group (row) and block (column)

MOST_COLUMNS = 64  # with more, blocks inside blocks are taken together
NUMBERED = re.compile(r"(.*?)(\d+)")  # a segment such as 3 or layer3: a word, or none, and a number


@dataclass(frozen=True)
class Block:
    """The numbered block that a layer lies in: the name of the list of such blocks, and the first numbers in it."""

    list: str
    numbers: tuple[int, ...]


def cells(names: Iterable[str], beside: Iterable[str] = ()) -> dict[Cell, list[str]]:
    """Return the layers of each cell of a picture. Layers may share a cell, as the experts of one block do.

    Rows are the groups of group_of. Columns are the numbers of blocks. They have the name of the list of blocks
    where a group has blocks in two lists, such as an encoder and a decoder. They have a second number where blocks lie
    in blocks, such as those of a ResNet's stages.

    Args:
        names: of layers.
        beside: names of other layers in the same picture.
    """
    names = list(names)
    every = list(dict.fromkeys([*names, *beside]))
    columns = _columns(every)
    shared: dict[Cell, list[str]] = {}
    for name in names:
        shared.setdefault((group_of(name), columns[name]), []).append(name)
    return shared


def _columns(names: Sequence[str]) -> dict[str, Column]:
    blocks = _blocks(names)
    lists_of: dict[str, set[str]] = {}
    for name, block in blocks.items():
        lists_of.setdefault(group_of(name), set()).add(block.list)
    lists = list(dict.fromkeys(block.list for block in blocks.values()))
    shown = dict.fromkeys(lists, "")
    if any(len(of_group) > 1 for of_group in lists_of.values()):
        shown = dict(zip(lists, short_lists(lists), strict=True))
    depth = 2 if _needs_second(blocks, shown) else 1
    found: dict[str, Column] = dict.fromkeys(names)
    for name, block in blocks.items():
        number = ".".join(map(str, block.numbers[:depth]))
        found[name] = f"{shown[block.list]} {number}" if shown[block.list] else number if depth > 1 else int(number)
    return found


def _needs_second(blocks: Mapping[str, Block], shown: Mapping[str, str]) -> bool:
    """Return whether blocks lie in blocks for most groups, several of one group in an outer one, and not too many."""
    single = {group_of(name) for name, block in blocks.items() if len(block.numbers) == 1}
    nested = {group_of(name) for name in blocks} - single
    cells = {(group_of(name), shown[block.list], block.numbers[0]) for name, block in blocks.items()}
    columns = {(shown[block.list], block.numbers[:2]) for block in blocks.values()}
    return len(nested) > len(single) and len(cells) < len(blocks) and len(columns) <= MOST_COLUMNS


def short_lists(lists: Sequence[str]) -> list[str]:
    """Return the names of lists of blocks without the segments that all begin or end with."""
    parts = [name.split(".") for name in lists]
    for step in (1, -1):
        parts = [each[::step] for each in parts]
        most = min(map(len, parts), default=1) - 1
        common = next((i for i in range(most) if len({each[i] for each in parts}) > 1), most) if len(parts) > 1 else 0
        parts = [each[common:][::step] for each in parts]
    return [".".join(each) or "blocks" for each in parts]


def _blocks(names: Iterable[str]) -> dict[str, Block]:
    """Return the block of each layer that has a number in its name.

    A segment such as layer1 has a number if there is another one beside it, such as layer2. A number after the last
    word, as in body.3, counts where no other is before that word.
    """
    split = {name: name.split(".") for name in names}
    siblings: dict[tuple[str, ...], set[str]] = {}
    for segments in split.values():
        for i, match in _numbered(segments).items():
            siblings.setdefault((*segments[:i], match[1]), set()).add(match[2])
    found = {}
    for name, segments in split.items():
        numbered = {
            i: match
            for i, match in _numbered(segments).items()
            if not match[1] or len(siblings[(*segments[:i], match[1])]) > 1
        }
        if not numbered and segments[-1].isdigit():
            after = _last_word(segments) + 1
            found[name] = Block(".".join(segments[:after]), (int(segments[after]),))
        elif numbered:
            first = min(numbered)
            words = [*segments[:first], *filter(None, [numbered[first][1]])]
            found[name] = Block(".".join(words), tuple(int(match[2]) for match in numbered.values()))
    return found


def _numbered(segments: Sequence[str]) -> dict[int, re.Match[str]]:
    """Return segments that may have a number, by their places: those before the last word, or all if there is none."""
    end = len(segments) if all(segment.isdigit() for segment in segments) else _last_word(segments)
    matches = {i: NUMBERED.fullmatch(segment) for i, segment in enumerate(segments[:end])}
    return {i: match for i, match in matches.items() if match}


def _last_word(segments: Sequence[str]) -> int:
    """Return the index of the last segment that is no number, or 0."""
    return next((i for i in reversed(range(len(segments))) if not segments[i].isdigit()), 0)


@dataclass(frozen=True)
class Grid:
    """Values by group (rows) and block (columns)."""

    rows: tuple[str, ...]
    columns: tuple[Column, ...]  # blocks of one list together and ascending; None, for layers without a number, is last
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
    columns = tuple(sorted({column for _, column in places}, key=_order))
    return Grid(
        rows,
        columns,
        tuple(tuple(values.get((row, column), math.nan) for column in columns) for row in rows),
        frozenset(
            (i, j) for i, row in enumerate(rows) for j, column in enumerate(columns) if (row, column) not in values
        ),
    )


def _order(column: Column) -> tuple[bool, bool, str, tuple[int, ...]]:
    """Return what columns are sorted by: an encoder comes before a decoder, other lists by their names."""
    of_list, number = parts_of(column)
    numbers = tuple(int(part) for part in number.split(".")) if column is not None else ()
    return column is None, "decoder" in of_list, of_list, numbers


def parts_of(column: Column) -> tuple[str, str]:
    """Return the list of a column, "" if it has none, and its number as text, "other" for None."""
    of_list, _, number = ("other" if column is None else str(column)).rpartition(" ")
    return of_list, number


def cell_name(cell: Cell) -> str:
    """Return a cell's name for titles."""
    group, column = cell
    if column is None:
        return group
    block = str(column) if parts_of(column)[0] else f"layer {column}"
    return block if group == NAMELESS else f"{group} of {block}"
