"""Merge a weight on a device that is not the CPU in two halves, between which the host reads the device's checks.

The host waits once a verb for all weights, not once a weight:

    with a copy:   the first half writes W' and asks whether it is finite; the second looks at the answer
    without one:   the first half counts the values that differ after unmerging; the second computes the same again,
                   writes W', and stores the values, whose number is known now

A count that depends on the values is known on the device only, and memory of that size can be taken only after a wait.
So without copies all is computed twice. That takes a little longer than one wait a chunk where chunks are large, and
has two gains: W' of every weight is known to be finite before the first weight without a copy is written, and no memory
is taken for values that are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch

from ..errors import NonFiniteError
from .bits import Corrections, differing, far_off, find_corrections, places
from .device_sum import Block, DeviceSum
from .merge_checks import Checks, Reading

STORE_AT_MOST = 0.25  # if more than this share of a chunk's values differs, a plain copy of the chunk is stored

Stored = Corrections | tuple[torch.Tensor, torch.Tensor] | torch.Tensor
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Parts = Sequence[tuple[torch.Tensor, Block]]  # views of a weight, each with the block that is added to it


@dataclass
class Pending:
    """What the second half of a merge needs."""

    parts: Parts
    finite: list[Reading]  # for each part, a sum of W' that is finite if all of W' is
    # Without a plain copy, for each part: how many values differ after unmerging, and how many of these are far off.
    counts: list[list[Reading]] = field(default_factory=list)
    observe: Observer | None = None


class Prepared(NamedTuple):
    """W' of one weight, computed with others (nn/merge_batches.py) and not written yet."""

    copy: torch.Tensor  # W
    delta: torch.Tensor | None  # D, if W' is round(W + D)
    exact: torch.Tensor | None  # else W' before it is rounded
    pending: Pending
    checksum: tuple[Reading, torch.dtype]  # of W', to be asked for when all weights are written

    def write_(self, weight: torch.Tensor) -> None:
        """Write W' into the weight. In place."""
        if self.delta is not None:
            torch.add(self.copy, self.delta.view(self.copy.shape), out=weight)
        else:
            weight.copy_(cast(torch.Tensor, self.exact))


def write_parts_(parts: Parts, scaling: float, checks: Checks, observe: Observer | None) -> Pending:
    """Write W' into each part, and ask whether it is finite. In place."""
    finite = []
    for window, block in parts:
        weights, summed = window.unsqueeze(0), DeviceSum([block], scaling, window.dtype)
        if observe:
            tell_observer(observe, summed, weights)
        finite += checks.ask(finite_sums(summed.rounded(weights, weights)))
    return Pending(parts, finite)


def count_parts(parts: Parts, scaling: float, checks: Checks, observe: Observer | None) -> Pending:
    """Ask whether W' is finite, and how many values have to be stored. The parts are only read.

    Args:
        parts: with copies of the factors, which the second half reads again.
        scaling: s.
        checks: of the verb.
        observe: called in the second half.
    """
    finite: list[Reading] = []
    counts = []
    for window, block in parts:
        new, back = there_and_back(window, DeviceSum([block], scaling, window.dtype))
        finite += checks.ask(finite_sums(new.unsqueeze(0)))
        asked = [differing(window, back)]
        if block.scale is not None:
            asked.append(far_off(window, back))
        counts.append([checks.ask(mask.sum())[0] for mask in asked])
    return Pending(parts, finite, counts, observe)


def there_and_back(window: torch.Tensor, summed: DeviceSum) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W' rounded, and what unmerging it computes before it corrects values; both are new tensors."""
    weights, delta = window.unsqueeze(0), summed.delta()
    new = summed.rounded(weights, torch.empty_like(weights, memory_format=torch.contiguous_format), delta)
    return new[0], summed.taken_out(new, delta)[0]


def taken_out(window: torch.Tensor, block: Block, scaling: float) -> torch.Tensor:
    """Return what unmerging a part computes before it corrects values, contiguous."""
    summed = DeviceSum([block], scaling, window.dtype)
    return summed.taken_out(window.unsqueeze(0), summed.delta())[0]


def stored_values(window: torch.Tensor, back: torch.Tensor, counts: Sequence[Reading]) -> Stored:
    """Return what corrects `back` to the bits of the window; a copy of the window if many elements differ.

    Args:
        window: W.
        back: what unmerging computes.
        counts: number of elements that differ; of a scaled part also how many of these are far off.
    """
    changed, *far = (int(count.get()) for count in counts)
    if changed > STORE_AT_MOST * window.numel():
        return window.clone()
    positions = places(differing(window, back), changed)
    if far:
        return find_corrections(window, back, positions, far[0])
    return positions.to(torch.int32), window.flatten().index_select(0, positions)


def finite_sums(weights: torch.Tensor) -> torch.Tensor:
    """Return a sum (n,) of each weight of a stack (n, ...). It is finite only if all values are."""
    dtype = torch.float32 if weights.dtype.itemsize == 2 else None  # a sum in float16 overflows soon
    return weights.flatten(1).sum(1, dtype=dtype)


def refuse_unless_finite(values: torch.Tensor, total: Reading) -> None:
    """Raise NonFiniteError if a value is not finite. A sum of finite values may overflow, so then all are looked at."""
    if not total.is_finite() and not torch.isfinite(values).all():
        raise NonFiniteError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")


def tell_observer(
    observe: Observer, summed: DeviceSum, weights: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Call an observer with W' rounded, W' and W' - W of a stack of weights W, in the dtype of the arithmetic.

    Args:
        observe: see merge_weight_.
        summed: of the weights.
        weights: W.
        dtype: to which W' is rounded, by default W's.
    """
    exact = summed.exact(weights)
    rounded = summed.rounded(weights, torch.empty_like(weights, dtype=dtype)).to(exact.dtype)
    change = exact - weights.to(exact.dtype) if summed.scale is not None else summed.delta().view(exact.shape)
    observe(rounded, exact, change)
