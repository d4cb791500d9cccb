"""Weighted means of tensors that several adapters fully trained. A sum of such values would mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LoRAError
from ..nn.variant import rows_leaf
from .adapter import Adapter
from .combined_layer import ROUNDING

COUNTER = "num_batches_tracked"  # BatchNorm's counter; the largest one is kept


def average_whole(used: Sequence[tuple[str, Adapter, float]]) -> dict[str, Any]:
    """Return the weighted mean of each tensor beside the factors, by name.

    Raises:
        LoRAError: an adapter lacks a tensor that another has, or the values have no mean.
    """
    values = []
    for name, each, weight in used:
        rows = {f"{table}.{rows_leaf()}": rows for table, rows in each.rows().items() if table not in each.tied}
        values.append((name, {**each.whole_tensors(), **rows}, weight))  # rows of a tie once
    names = dict.fromkeys(key for _, held, _ in values for key in held)
    for key in names:
        lacking = next((name for name, held, _ in values if key not in held), None)
        if lacking is not None:
            holder = next(name for name, held, _ in values if key in held)
            raise LoRAError(
                f"combine: {key!r} was fully trained in {holder} and not in {lacking}, which does not say what it was "
                "there. Combine adapters with the same modules_to_save, bias and trained rows."
            )
    return {key: _mean(key, [(name, held[key], weight) for name, held, weight in values]) for key in names}


def _mean(key: str, values: Sequence[tuple[str, Any, float]]) -> Any:
    """Return the weighted mean of one tensor, given each adapter's name, value and weight."""
    (first_name, first, _), *others = values
    if all(_equal(first, value) for _, value, _ in others):
        return first
    for name, value, _ in others:
        if not isinstance(first, torch.Tensor) or not isinstance(value, torch.Tensor) or first.shape != value.shape:
            raise LoRAError(f"combine: {key!r} differs between {first_name} and {name}, and has no mean.")
    if not first.is_floating_point():
        if key.rpartition(".")[2] == COUNTER:
            return torch.stack([value for _, value, _ in values]).amax(0)
        raise LoRAError(f"combine: {key!r} is of whole numbers, which differ between the adapters, and has no mean.")
    total = sum(weight for _, _, weight in values)
    if abs(total) <= ROUNDING * max(abs(weight) for _, _, weight in values):
        raise LoRAError(f"combine: the weights sum up to 0, so {key!r}, which was fully trained, has no weighted mean.")
    mean = sum((value.double() * (weight / total) for _, value, weight in values), torch.zeros(()).double())
    if key.endswith("running_var") and (mean < 0).any():
        raise LoRAError(f"combine: a negative weight makes the variances in {key!r} negative.")
    return mean.to(first.dtype)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
