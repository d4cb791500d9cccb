"""The base's fingerprint: shape, dtype and a few values of each frozen parameter, which tell one base from another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ..config import tasks_with
from ..distributed.flat import unsharded_shape
from ..distributed.sharding import samples, samples_of_all
from ..errors import LoRAError
from ..names import parent_names
from .adapter import Adapter

Tables = Mapping[str, Collection[int]]  # rows of a table that the adapter replaces, by the table's name

SAMPLES = 8  # values of each frozen parameter that its fingerprint holds
EQUAL = 1e-5  # the same base differs by no more, relatively
MOST_HEADS = 2  # a new head has at most so many modules
QUANTISED = torch.finfo(torch.bfloat16).eps  # weights quantised alike differ so, as devices round scales differently
AVERAGED = 1e-2  # a moving average of a frozen weight drifts by its own rounding
REMEDY = "Load the adapter on the base that it was trained on, or pass strict_base=False, which makes this a warning."


def without_rows(entries: Mapping[str, Any], tables: Tables) -> dict[str, Any]:
    """Return the entries with NaN for each value that lies in these rows of these tables."""
    masked = dict(entries)
    for table, rows in tables.items():
        name = f"{table}.weight"
        if rows and name in entries and len(entries[name]["shape"]) == 2:
            height, width = entries[name]["shape"]
            places = zip(sample_positions(height * width), entries[name]["values"], strict=True)
            values = [math.nan if place // width in rows else value for place, value in places]
            masked[name] = entries[name] | {"values": values}
    return masked


def fingerprint_entry(weight: torch.Tensor) -> dict[str, Any]:
    """Return shape, dtype and a few values of a tensor."""
    shape = unsharded_shape(weight)
    positions = sample_positions(shape.numel())
    return entry_of(shape, weight.dtype, samples(weight, positions))


def fingerprint_entries(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Return the fingerprint_entry of many tensors, faster than one by one. Collective where they are sharded.

    Args:
        weights: each name with its tensor. No tensor is kept, so an iterator may make them one by one.
    """
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def with_positions() -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
        for name, weight in weights:
            found[name] = shape, _ = unsharded_shape(weight), weight.dtype
            yield weight, sample_positions(shape.numel())

    values = samples_of_all(with_positions())
    return {name: entry_of(*found[name], of_name) for name, of_name in zip(found, values, strict=True)}


def entry_of(shape: Iterable[int], dtype: torch.dtype, values: list[float]) -> dict[str, Any]:
    """Return an entry of a fingerprint, as plain types."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "values": values}


@lru_cache(maxsize=1024)
def sample_positions(numel: int) -> tuple[int, ...]:
    """Return the positions of the sampled values in the flattened tensor."""
    return tuple(_positions(numel))


def _positions(numel: int) -> list[int]:
    return sorted({(numel - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)}) if numel else []


def compare_fingerprints(
    present: Mapping[str, Any],
    expected: Mapping[str, Any],
    relative: float = EQUAL,
    *,
    strict: bool = True,
    remedy: str = REMEDY,
    saved: Sequence[str] = (),
    adapted: Collection[str] = (),
) -> None:
    """Raise LoRAError for the first difference, in the order of `present`. Names that only `present` has are ignored.

    If all differences lie in a few modules, the message says so: each program draws a new head's values anew.

    Args:
        present: entries by name, of the base at hand.
        expected: of the adapter's base.
        relative: difference between values that are equal.
        strict: whether another base is an error or a warning.
        remedy: the advice at the end of the error.
        saved: modules_to_save as it is, which the advice goes on with.
        adapted: the names of the adapted layers.
    """
    order = {name: position for position, name in enumerate(present)}
    differing: list[str] = []
    difference = ""
    for name in sorted(expected, key=lambda name: order.get(name, -1)):
        before, now = expected[name], present.get(name)
        if now is None:
            found = f"its frozen parameter {name!r} is not here"
        elif list(now["shape"]) != list(before["shape"]):
            found = f"{name!r} had shape {before['shape']}, here {now['shape']}"
        elif not entries_match(before, now, relative):
            found = f"values of {name!r} were {_shown(before['values'])}, here {_shown(now['values'])}"
        else:
            continue
        difference = difference or found
        differing.append(name)
    if not differing:
        return
    hint = _quantised_hint(differing, present, expected) or _head_hint(differing, expected, saved, adapted)
    of_dtype = _dtype_hint(differing, present, expected)
    message = f"adapter: belongs to another base: {difference}.{hint}{of_dtype}"
    if strict:
        raise LoRAError(f"{message} {remedy}")
    warnings.warn(f"lightning_lora: {message}", stacklevel=3)


def without_base(adapter: Adapter, base: Set[str] | None = None) -> Adapter:
    """Replace tensors of the base by entries in the fingerprint; by default all tensors in perhaps_base.

    By default nobody has compared names with a model yet, so they stay in perhaps_base.
    """
    undecided = adapter.perhaps_base - (base or set())
    base = adapter.perhaps_base & adapter.tensors.keys() if base is None else base
    return replace(
        adapter,
        tensors={name: value for name, value in adapter.tensors.items() if name not in base},
        fingerprint={
            **adapter.fingerprint,
            **{name: fingerprint_entry(adapter.tensors[name]) for name in sorted(base)},
        },
        perhaps_base=undecided,
    )


def warn_of_rounding(present: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Warn where an adapter was trained on rounded weights, and the present base has more digits."""
    for name, before in expected.items():
        now = present.get(name)
        if now is None or before["dtype"] == now["dtype"] or before.get("quantised") or now.get("quantised"):
            continue
        if not entries_match(before, now, EQUAL):
            continue  # another base, of which compare_fingerprints tells
        was, is_now = (getattr(torch, entry["dtype"]) for entry in (before, now))
        if not (was.is_floating_point and is_now.is_floating_point) or _equal(before["values"], now["values"]):
            continue
        if torch.finfo(is_now).eps < torch.finfo(was).eps:
            warnings.warn(
                f"lightning_lora: the adapter was trained on a base in {before['dtype']}, and this one is in "
                f"{now['dtype']}, with other digits ({name!r}: {_shown(before['values'])}, here "
                f"{_shown(now['values'])}): outputs differ a little from those in training. Cast the base (the model, "
                f"or its file) to {before['dtype']} first to have the same.",
                stacklevel=3,
            )
            return


def entries_match(before: Mapping[str, Any], now: Mapping[str, Any], relative: float) -> bool:
    """Tell whether two entries have equal shapes, and values equal up to the rounding of the coarser dtype."""
    if list(before["shape"]) != list(now["shape"]) or len(before["values"]) != len(now["values"]):
        return False
    if before["dtype"] == now["dtype"] and before["values"] == now["values"]:
        return True
    absolute = 0.0
    if before.get("quantised") and before.get("quantised") == now.get("quantised"):
        relative = max(relative, QUANTISED)
    dtypes = {getattr(torch, entry["dtype"]) for entry in (before, now)}
    if len(dtypes) > 1:
        relative = max([relative, *(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)])
        absolute = 1e-7  # float16 holds smaller numbers with fewer digits
    return all(
        a == b or math.isclose(a, b, rel_tol=relative, abs_tol=absolute) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(before["values"], now["values"], strict=True)
    )


def _quantised_hint(differing: Iterable[str], present: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Say that the base was quantised differently in training, if it was."""
    for name in differing:
        was, is_now = (entries.get(name, {}).get("quantised", "") for entries in (expected, present))
        if was != is_now:
            return (
                f" Where the adapter was trained the base was {_quantised_words(was)}, here it is "
                f"{_quantised_words(is_now)}, which changes its values; an adapter often serves both."
            )
    return ""


def _dtype_hint(differing: Iterable[str], present: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Say that the base had another dtype in training, if it had: random values are drawn differently in each."""
    for name in differing:
        before, now = expected[name], present.get(name, expected[name])
        if before["dtype"] != now["dtype"] and before.get("quantised") == now.get("quantised"):
            return (
                f" The adapter was trained on a base in {before['dtype']}, and this one is in {now['dtype']}, which "
                f"changes values: try the base in {before['dtype']}."
            )
    return ""


def _quantised_words(quantised: str) -> str:
    return f"quantised ({quantised})" if quantised else "not quantised"


def _equal(before: Iterable[float], now: Iterable[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(before, now, strict=True))


def _head_hint(
    differing: Iterable[str], expected: Mapping[str, Any], saved: Sequence[str], adapted: Collection[str]
) -> str:
    """Say that only a new head may differ, if the differences lie in a few modules in which nothing is equal.

    Biases that start from zero are equal anyway and do not count. A module with most of the weights is no head, and
    neither is an adapted layer of a numbered block.
    """
    differing = list(differing)
    sizes = {name: math.prod(entry["shape"]) for name, entry in expected.items()}
    if 2 * sum(sizes[name] for name in differing) > sum(sizes.values()):
        return ""
    telling = {name for name, entry in expected.items() if len(set(entry["values"])) > 1}
    with_equal = {module for name in telling - set(differing) for module in parent_names(name)}
    modules = [next((module for module in parent_names(name) if module not in with_equal), "") for name in differing]
    heads = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    in_blocks = {name for name in adapted if any(part.isdigit() for part in name.split(".")[:-1])}
    if not with_equal or "" in heads or len(heads) > MOST_HEADS or not in_blocks.isdisjoint(modules):
        return ""
    or_task = " (or task_type)" if tasks_with(heads) else ""
    return (
        f" All that differs lies in {', '.join(map(repr, heads))}: if that is a new head, which starts from other "
        f"random values in each program, train and save it whole with modules_to_save={[*saved, *heads]}{or_task}."
    )


def _shown(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in list(values)[:4]) + ", ...]"
