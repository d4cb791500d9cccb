"""Merge weights of one shape in one batched product, on a device that is not the CPU.

A small weight takes a device less time than the host needs to ask for it. Of n weights of one shape, dtype and device
that are merged with plain copies, one stack of n is the copies, one batched product is D of all, and one sum over the
stack is a check of each. Only writing W' back takes an operator for each weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from .bits import BITS
from .device_merge import Observer, Pending, Prepared, finite_sums, tell_observer
from .device_sum import DeviceSum
from .exact_merge import GPU_CHUNK, RestoreRecord, exact_arithmetic
from .low_rank import LowRankBlock
from .merge_checks import Checks

LARGEST = 2**22  # elements of a weight; a larger one keeps the device busy for as long as the host needs


class Item(NamedTuple):
    """A weight that is about to be merged."""

    weight: torch.Tensor  # W
    blocks: list[LowRankBlock]
    scaling: float
    observe: Observer | None


class Batch:
    """Weights that one batched product serves. It is computed when the first of them is asked for."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.prepared: list[Prepared] = []

    def take(self, place: int, checks: Checks) -> Prepared:
        """Return what one of the items is merged with.

        Args:
            place: number of the item.
            checks: of the verb.
        """
        if not self.prepared:
            self.prepared = _prepare(self.items, checks)
        return self.prepared[place]


def batches(items: Iterable[tuple[Hashable, Item]]) -> dict[Hashable, tuple[Batch, int]]:
    """Return the batch, and the place in it, of each item that is merged faster with others. Each item has a key."""
    alike: dict[Hashable, list[tuple[Hashable, Item]]] = defaultdict(list)
    for key, item in items:
        if _fits(item):
            alike[_likeness(item)].append((key, item))
    found: dict[Hashable, tuple[Batch, int]] = {}
    for group in alike.values():
        most = max(1, GPU_CHUNK // max(1, group[0][1].weight.numel()))
        for first in range(0, len(group), most):
            some = group[first : first + most]
            if len(some) > 1:
                batch = Batch([item for _, item in some])
                found |= {key: (batch, place) for place, (key, _) in enumerate(some)}
    return found


def ask_for_sums(merged: Iterable[tuple[torch.Tensor, RestoreRecord]], checks: Checks) -> None:
    """Ask for the sums of the bits of weights that are about to be unmerged, where one sum serves many.

    Args:
        merged: weights with plain copies, and their records.
        checks: of the verb.
    """
    alike: dict[tuple[Any, ...], list[tuple[torch.Tensor, RestoreRecord]]] = defaultdict(list)
    for weight, record in merged:
        small = 0 < weight.numel() <= LARGEST and weight.device.type != "cpu"
        if small and record.copy is not None and record.checksum is not None and record.found is None:
            alike[weight.shape, weight.dtype, weight.device, record.checksum[1]].append((weight, record))
    for (*_, integers), group in alike.items():
        most = max(1, GPU_CHUNK // group[0][0].numel())
        for first in range(0, len(group), most):
            some = group[first : first + most]
            if len(some) > 1:
                with exact_arithmetic(some[0][0]):
                    stack = torch.stack([weight.detach() for weight, _ in some])
                    sums = _bit_sums(stack, integers)
                for (_, record), reading in zip(some, checks.ask(sums), strict=True):
                    record.found = reading


def _fits(item: Item) -> bool:
    """Return whether a weight is small, on a device, and merged as a whole by one block."""
    weight, block = item.weight, item.blocks[0]
    whole = len(item.blocks) == 1 and (len(block.left), len(block.left) * block.right.shape[1]) == (
        len(weight),
        weight.numel(),
    )
    return whole and not block.replaces and 0 < weight.numel() <= LARGEST and weight.device.type != "cpu"


def _likeness(item: Item) -> Hashable:
    """Return a value that is equal for weights that can be merged together."""
    weight, block = item.weight, item.blocks[0]
    tensors = [weight, block.left, block.right, *([] if block.scale is None else [block.scale])]
    likeness = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    return *likeness, item.scaling, item.observe, weight.is_inference()


def _prepare(items: list[Item], checks: Checks) -> list[Prepared]:
    first = items[0]
    with exact_arithmetic(first.weight):
        weights = torch.stack([item.weight.detach() for item in items])  # these are the copies
        summed = DeviceSum([item.blocks[0] for item in items], first.scaling, weights.dtype)
        if first.observe:
            tell_observer(first.observe, summed, weights)
        merged = summed.rounded(weights, torch.empty_like(weights))
        finite = checks.ask(finite_sums(merged))
        integers = torch.int64 if merged[0].nbytes % 8 == 0 else BITS[merged.element_size()]
        sums = _bit_sums(merged, integers)
    parts = zip(items, weights.unbind(), merged.unbind(), finite, checks.ask(sums), strict=True)
    return [
        Prepared(copy, new, Pending([(item.weight, item.blocks[0])], [total]), (bits, integers))
        for item, copy, new, total, bits in parts
    ]


def _bit_sums(weights: torch.Tensor, integers: torch.dtype) -> torch.Tensor:
    """Return the sum (n,) of the bits of each weight of a contiguous stack, read as integers of a dtype."""
    return weights.flatten(1).view(integers).sum(1)
