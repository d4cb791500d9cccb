"""The base's fingerprint: shape, dtype and a few values of each frozen parameter, which tell one base from another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import samples, samples_of_all
from ..errors import LoRAError
from ..files.safetensors import TensorLocation, read_elements
from ..files.weights import Weights
from ..model.adapted_model import AdaptedModel, open_model
from ..model.live_state import LiveState, original_value
from ..names import parent_names
from ..nn.lora_layer import LoRALayer, adapted_places
from ..nn.quantised import dequantize, quantised_as
from .adapter import Adapter

Tables = Mapping[str, Collection[int]]  # rows of a table that the adapter replaces, by the table's name

SAMPLES = 8  # values of each frozen parameter that its fingerprint holds
EQUAL = 1e-5  # relative difference of a base that is the same
MOST_HEADS = 2  # modules of a head
QUANTISED = torch.finfo(torch.bfloat16).eps  # of weights quantised alike: where they are evaluated, scales are rounded
AVERAGED = 1e-2  # of the base that was trained on here: a moving average of a frozen weight drifts by its own rounding
# What to do about another base, unless the caller knows better.
OTHER_FILES = "Give the base that it was trained on as --base, or pass --strict-base=false, which makes this a warning."
REMEDY = "Load the adapter on the base that it was trained on, or pass strict_base=False, which makes this a warning."


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return fingerprint_of an injected model. Collective where the model is sharded."""
    return fingerprint_of(LiveState(open_model(model, "fingerprint")))


def fingerprint_of(live: LiveState) -> dict[str, Any]:
    """Return the entry of each frozen base parameter, as plain types. Collective where the model is sharded.

    A quantised one's is of its dequantised values, and says how it is quantised. Values in rows that the adapter
    replaces are NaN: they need not be the same anywhere else.
    """
    trained = set(live.keys)
    frozen = [entry for entry in live.entries if entry[0] not in trained and entry[1] is not None]
    present = [(name, tensor, owner) for name, tensor, owner in frozen if tensor.device.type != "meta"]
    how = {name: _how_quantised(tensor, owner) for name, tensor, owner in present}
    plain = {n: original_value(n, tensor, owner) for n, tensor, owner in present if not how[n]}
    entries = fingerprint_entries(plain)
    for name, _, owner in present:
        if how[name]:
            value = dequantize(owner, name.rpartition(".")[2])
            entries[name] = {**fingerprint_entry(value), "quantised": how[name]}
    return without_rows({name: entries[name] for name in how}, replaced_rows(live.handle))


def replaced_rows(handle: AdaptedModel) -> Tables:
    """Return which rows of which tables of a model its adapter replaces, under each name of a table."""
    places = adapted_places(handle.model, modules=handle.places)
    return {name: rows for name, _, each in places if (rows := each.replaced_rows())}


def without_rows(entries: Mapping[str, Any], tables: Tables) -> dict[str, Any]:
    """Return entries in which values in these rows of tables are NaN."""
    masked = dict(entries)
    for table, rows in tables.items():
        name = f"{table}.weight"
        if rows and name in entries and len(entries[name]["shape"]) == 2:
            height, width = entries[name]["shape"]
            places = zip(sample_positions(height * width), entries[name]["values"], strict=True)
            values = [math.nan if place // width in rows else value for place, value in places]
            masked[name] = entries[name] | {"values": values}
    return masked


def _how_quantised(tensor: torch.Tensor, module: nn.Module) -> str:
    if isinstance(module, LoRALayer) and tensor is module.main_weight():
        return module.quantised()
    return quantised_as(tensor)


def fingerprint_entry(weight: torch.Tensor) -> dict[str, Any]:
    """Return shape, dtype and a few values of a tensor."""
    return _entry(weight.shape, weight.dtype, samples(weight, sample_positions(weight.numel())))


def fingerprint_entries(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Return fingerprint_entry of many tensors, in less time than one by one. Collective where they are sharded."""
    at = {name: sample_positions(weight.numel()) for name, weight in weights.items()}
    values = samples_of_all([(weight, at[name]) for name, weight in weights.items()])
    return {
        name: _entry(weight.shape, weight.dtype, found)
        for (name, weight), found in zip(weights.items(), values, strict=True)
    }


def fingerprint_entry_at(location: TensorLocation) -> dict[str, Any]:
    """Return the same of a tensor in a file, of which it reads no more."""
    return _entry(location.shape, location.dtype, read_elements(location, sample_positions(location.numel)))


def _entry(shape: Iterable[int], dtype: torch.dtype, values: list[float]) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "values": values}


@lru_cache(maxsize=1024)
def sample_positions(numel: int) -> tuple[int, ...]:
    """Return which elements of a tensor, counted in order, its entry holds."""
    return tuple(_positions(numel))


def _positions(numel: int) -> list[int]:
    return sorted({(numel - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)}) if numel else []


def check_fingerprint(
    live: LiveState, expected: Mapping[str, Any], *, strict: bool = True, remedy: str = REMEDY
) -> dict[str, Any]:
    """Raise LoRAError, or warn, where a frozen parameter differs from a fingerprint by more than another dtype's.

    Args:
        live: an injected model.
        expected: the fingerprint.
        strict: whether another base is an error or a warning.
        remedy: what the error says that its reader can do.

    Returns:
        The fingerprint of the model, or nothing where nothing is expected.
    """
    if not expected:
        return {}
    known, tables = live.handle.record.fingerprint, replaced_rows(live.handle)
    unfrozen = fingerprint_entries(live.handle.initial_of("unfrozen")) if live.handle.record.unfrozen else {}
    same_names = expected.keys() <= known.keys()  # fewer where weights were unfrozen since fit start
    trained_here = same_names and all(entries_match(known[name], expected[name], 0) for name in expected)
    present = without_rows(unfrozen, tables) | fingerprint_of(live)
    # One that was made of files holds buffers too, which do not tell a base: training changes them.
    buffers = {name for name, tensor in live.tensors.items() if not isinstance(tensor, nn.Parameter)}
    expected = without_rows({n: entry for n, entry in expected.items() if n not in buffers}, tables)
    compare_fingerprints(present, expected, AVERAGED if trained_here else EQUAL, strict=strict, remedy=remedy)
    return present


def compare_fingerprints(
    present: Mapping[str, Any],
    expected: Mapping[str, Any],
    relative: float = EQUAL,
    *,
    strict: bool = True,
    remedy: str = REMEDY,
) -> None:
    """Raise LoRAError for the first difference, in the order of `present`; what only that has is not judged.

    Where all that differs lies in a few modules, as that of a head which each program draws anew, it says so.

    Args:
        present: entries by name, of the base at hand.
        expected: of the adapter's base.
        relative: difference between values that are equal.
        strict: whether another base is an error or a warning.
        remedy: what the error says that its reader can do.
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
    hint = _quantised_hint(differing, present, expected) or _head_hint(differing, expected)
    message = f"adapter: belongs to another base: {difference}.{hint}"
    if strict:
        raise LoRAError(f"{message} {remedy}")
    warnings.warn(f"lightning_lora: {message}", stacklevel=3)


def compare_with_files(adapter: Adapter, base: Weights, *, strict: bool = True, remedy: str = OTHER_FILES) -> None:
    """Raise LoRAError, or warn, where weights on disk are another base than the adapter's, which has their names.

    What both name is compared: a file may hold tied weights once, or experts under other names than a model.
    """
    packed = {f"{module}.weight" for module in base.quantised()}
    named = adapter.fingerprint.keys() - packed
    locations = {name: base.locations[name] for name in adapter.fingerprint if name in named & base.locations.keys()}
    entries = {name: fingerprint_entry_at(location) for name, location in locations.items() if location.in_order}
    tables = {**{end: adapter.tables.get(first, ()) for end, first in adapter.tied.items()}, **adapter.tables}
    entries = without_rows(entries, tables)
    expected = without_rows({name: adapter.fingerprint[name] for name in entries}, tables)
    compare_fingerprints(entries, expected, strict=strict, remedy=remedy)
    warn_of_rounding(entries, adapter.fingerprint)


def warn_of_rounding(present: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Warn where an adapter was trained on rounded weights, and is on the weights that these were rounded from here."""
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
                f"{_shown(now['values'])}): outputs differ a little from those in training. Cast the model to "
                f"{before['dtype']} before loading to have the same.",
                stacklevel=3,
            )
            return


def entries_match(before: Mapping[str, Any], now: Mapping[str, Any], relative: float) -> bool:
    """Tell whether two entries have one shape and equal values, up to rounding: between dtypes, of the coarser one."""
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
        absolute = 1e-7  # subnormal numbers of float16
    return all(
        a == b or math.isclose(a, b, rel_tol=relative, abs_tol=absolute) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(before["values"], now["values"], strict=True)
    )


def _quantised_hint(differing: Iterable[str], present: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Say that the base was quantised otherwise where the adapter was trained, if that is so."""
    for name in differing:
        was, is_now = (entries.get(name, {}).get("quantised", "") for entries in (expected, present))
        if was != is_now:
            return (
                f" Where the adapter was trained the base was {_quantised_words(was)}, here it is "
                f"{_quantised_words(is_now)}, which changes its values; an adapter often serves both."
            )
    return ""


def _quantised_words(quantised: str) -> str:
    return f"quantised ({quantised})" if quantised else "not quantised"


def _equal(before: Iterable[float], now: Iterable[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(before, now, strict=True))


def _head_hint(differing: Iterable[str], expected: Mapping[str, Any]) -> str:
    """Say that a new head may be all that differs, where that lies in a few modules in which nothing else is equal.

    Biases that all start from zero tell nothing, and what holds most of the model is no head.
    """
    differing = list(differing)
    sizes = {name: math.prod(entry["shape"]) for name, entry in expected.items()}
    if 2 * sum(sizes[name] for name in differing) > sum(sizes.values()):
        return ""
    telling = {name for name, entry in expected.items() if len(set(entry["values"])) > 1}
    with_equal = {module for name in telling - set(differing) for module in parent_names(name)}
    modules = [next((module for module in parent_names(name) if module not in with_equal), "") for name in differing]
    heads = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    if not with_equal or "" in heads or len(heads) > MOST_HEADS:
        return ""
    return (
        f" All that differs lies in {', '.join(map(repr, heads))}: if that is a new head, which starts from other "
        f"random values in each program, train and save it whole with modules_to_save={heads} (or task_type)."
    )


def _shown(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in list(values)[:4]) + ", ...]"
