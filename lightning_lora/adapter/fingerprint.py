"""The base's fingerprint: shape, dtype and a few values of each frozen parameter, which tell one base from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import samples_of_all
from ..errors import LoRAError
from ..names import listed
from ..notices import warn

SAMPLES = 8  # values of a frozen parameter that its fingerprint holds
MOST_SAMPLED = 512  # parameters of which a fingerprint holds values
RELATIVE, ABSOLUTE = 1e-2, 1e-6  # bfloat16, float16 and moving averages round by less
REMEDY = "Load the adapter on the base that it was trained on, or pass strict_base=False, which makes this a warning."
OF_A_HEAD = 4  # weights and biases of a head and what stands before it
OF_HEADS = "A new head has other random values in each program: train and save it whole with modules_to_save."
OF_QUANTIZATION = (
    "Quantize the base as in training before it is adapted, NF4Tensor by quantize_base with the options of that run, "
    "others as transformers loads them."
)


class Entry(NamedTuple):
    """What a fingerprint holds of a frozen tensor, as plain types."""

    dtype: str
    shape: list[int]
    values: list[float]  # none of a quantized weight, and none where something else decides the values
    quantized: str = ""  # how


def entry_of(shape: Iterable[int], dtype: torch.dtype, values: Iterable[float] = (), *, quantized: str = "") -> Entry:
    """Return an entry of a fingerprint; six digits of a value tell enough."""
    digits = [float(f"{value:.6g}") for value in values]
    return Entry(str(dtype).removeprefix("torch."), list(shape), digits, quantized)


def fingerprint_entries(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Entry]:
    """Return the entries of tensors. Collective where they are sharded.

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


@lru_cache(maxsize=1024)
def sample_positions(numel: int) -> tuple[int, ...]:
    """Return the positions of the sampled values in the flattened tensor."""
    return tuple(sorted({(numel - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)})) if numel else ()


def evenly_chosen(names: Sequence[str]) -> set[str]:
    """Return the names of the parameters of which a fingerprint holds values."""
    count = min(len(names), MOST_SAMPLED)
    return {names[i * len(names) // count] for i in range(count)}


def compare_fingerprints(
    present: Mapping[str, Entry],
    expected: Mapping[str, Entry],
    *,
    strict: bool = True,
    remedy: str = REMEDY,
    of_quantization: str = "",
) -> None:
    """Raise LoRAError, or warn, where entries differ. Names that only `present` has are ignored.

    Args:
        present: entries by name, of the base at hand, in the order of the model.
        expected: of the adapter's base.
        strict: whether another base is an error or a warning.
        remedy: the advice at the end of the error.
        of_quantization: the advice instead where weights were quantized in another way.
    """
    order = {name: position for position, name in enumerate(present)}
    names = sorted(expected, key=lambda name: order.get(name, -1))
    found = {name: said for name in names if (said := _difference(name, expected[name], present.get(name)))}
    if not found:
        return
    otherwise = [name for name in found if name in present and expected[name].quantized != present[name].quantized]
    first = next(iter((*otherwise, *found)))  # the quantization comes first: without it values cannot be compared
    message = (
        f"adapter: belongs to another base: {found[first]}. {len(found)} of {len(expected)} frozen tensors differ "
        f"({listed([repr(name) for name in found])})."
    )
    if otherwise and not expected[first].quantized:
        message += " Load the base without quantizing it, as in training."
    elif otherwise:
        remedy = of_quantization or f"{OF_QUANTIZATION} {remedy}"
    elif len(found) <= OF_A_HEAD and 2 * len(found) < sum(bool(entry.values) for entry in expected.values()):
        message += f" {OF_HEADS}"
    if strict:
        raise LoRAError(f"{message} {remedy}")
    warn(f"lightning_lora: {message}")


def _difference(name: str, before: Entry, now: Entry | None) -> str:
    """Say how an entry of a base differs from the adapter's, or "" where they match."""
    if now is None:
        return f"its frozen parameter {name!r} is not here"
    if list(now.shape) != list(before.shape):
        return f"{name!r} had shape {before.shape}, here {now.shape}"
    if now.quantized != before.quantized:
        was, is_now = (f"quantized ({how})" if how else "not quantized" for how in (before.quantized, now.quantized))
        return f"at {name!r} the base was {was}, here it is {is_now}"
    if entries_match(before, now):
        return ""
    return f"values of {name!r} were {_shown(before.values)}, here {_shown(now.values)}"


def entries_match(before: Entry, now: Entry) -> bool:
    """Tell whether two entries have equal shapes, and equal values where both hold some."""
    return list(before.shape) == list(now.shape) and all(
        math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(before.values, now.values, strict=False)
    )


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values[:4]) + ", ...]"
