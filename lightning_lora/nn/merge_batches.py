"""Merge weights of one shape in one batched product, on a device that is not the CPU.

A small weight takes a device less time than the host needs to ask for it. Of n weights of one shape, dtype and device
that are merged with plain copies, one stack of n is the copies, one batched product is D of all, and one sum over a
stack is a check of each. Only writing W' takes an operator for each weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch

from .bits import BITS
from .device_merge import Observer, Pending, Prepared, finite_sums, tell_observer
from .device_sum import DeviceSum
from .exact_merge import GPU_CHUNK, exact_arithmetic
from .low_rank import LowRankBlock
from .merge_checks import Checks, Reading

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


def _fits(item: Item) -> bool:
    """Return whether a weight is small, on a device, and merged as a whole by one block."""
    weight, block = item.weight, item.blocks[0]
    whole = len(item.blocks) == 1 and (len(block.left), len(block.left) * block.right.shape[1]) == (
        len(weight),
        weight.numel(),
    )
    return (
        whole
        and not block.replaces
        and not block.stride
        and 0 < weight.numel() <= LARGEST
        and weight.device.type != "cpu"
    )


def _likeness(item: Item) -> Hashable:
    """Return a value that is equal for weights that can be merged together."""
    weight, block = item.weight, item.blocks[0]
    tensors = [weight, block.left, block.right, *([] if block.scale is None else [block.scale])]
    likeness = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    return *likeness, item.scaling, item.observe, weight.is_inference()


def _prepare(items: list[Item], checks: Checks) -> list[Prepared]:
    first, count = items[0], len(items)
    with exact_arithmetic(first.weight):
        weights = torch.stack([item.weight.detach() for item in items])  # these are the copies
        summed = DeviceSum([item.blocks[0] for item in items], first.scaling, weights.dtype)
        if first.observe:
            tell_observer(first.observe, summed, weights)
        sums = summed.delta() if summed.is_added() else summed.exact(weights)
    deltas: Iterable[torch.Tensor | None] = sums.unbind() if summed.is_added() else [None] * count
    exacts: Iterable[torch.Tensor | None] = [None] * count if summed.is_added() else sums.unbind()
    integers = torch.int64 if weights[0].nbytes % 8 == 0 else BITS[weights.element_size()]
    finite, bits = _ask_when_written(items, integers, checks)
    pending = [Pending([(item.weight, item.blocks[0])], [total]) for item, total in zip(items, finite, strict=True)]
    checksums = [(total, integers) for total in bits]
    parts = zip(weights.unbind(), deltas, exacts, pending, checksums, strict=True)
    return [Prepared(*each) for each in parts]


def _ask_when_written(items: list[Item], integers: torch.dtype, checks: Checks) -> tuple[list[Reading], list[Reading]]:
    """Ask for sums of W' of all weights, and for sums of their bits. They are computed when all are written."""
    written: list[torch.Tensor] = []

    def finite() -> torch.Tensor:
        with exact_arithmetic(items[0].weight):
            written[:] = [torch.stack([item.weight.detach() for item in items])]
            return finite_sums(written[0])

    def bits() -> torch.Tensor:
        with exact_arithmetic(items[0].weight):
            return written[0].flatten(1).view(integers).sum(1)

    return checks.ask_later(len(items), finite), checks.ask_later(len(items), bits)
