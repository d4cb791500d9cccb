"""Say where a layer stands in a picture: which line is its group's, and at which depth."""

from __future__ import annotations

from collections.abc import Collection
from itertools import zip_longest

from ..names import NUMBER, group_of


def places(names: Collection[str]) -> dict[str, tuple[str, int | None]]:
    """Return each layer's group and depth.

    The depth is the first number in the name; a name without a number has none. Where blocks of several lists have one
    group, as those of an encoder and a decoder, the name of the list follows the group's.
    """
    numbers = {name: NUMBER.search(name) for name in names}
    lists: dict[str, dict[str, str]] = {}  # of each group: the name before the number, and what is shown of it
    for name, number in numbers.items():
        if number:
            lists.setdefault(group_of(name), {})[name[: number.start()]] = ""
    lists = {group: _short(of_group) for group, of_group in lists.items()}
    found: dict[str, tuple[str, int | None]] = {}
    for name, number in numbers.items():
        group = group_of(name)
        shown = lists[group][name[: number.start()]] if number else ""
        depth = int(number[0].strip(".")) if number else None
        found[name] = (f"{group} ({shown})" if shown else group, depth)
    return found


def _short(lists: Collection[str]) -> dict[str, str]:
    """Return the first segment in which the names of lists differ; the whole names where it does not tell them apart.

    A single list needs no name.
    """
    if len(lists) == 1:
        return dict.fromkeys(lists, "")
    columns = zip_longest(*(name.split(".") for name in lists), fillvalue="")
    segments = next(column for column in columns if len(set(column)) > 1)
    return dict(zip(lists, segments if len(set(segments)) == len(lists) else lists, strict=True))
