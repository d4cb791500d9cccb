"""Counts what a device that is not the CPU is asked to do, on the pretended device.

An operator counts as one kernel, and views as none. So this says nothing of the kernels of one operator, of speed, and
of the time that the host takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from support import pretend_device
from support.pretend_device import DEVICE

NO_KERNEL = {  # beside views: they allocate, or say something of a tensor
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "set_"),
    *("t_", "transpose_", "squeeze_", "unsqueeze_", "detach_"),
}
WAITS = {  # the host reads a value, or a shape that depends on values
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "repeat_interleave"),
}


NUMBERS = ("launches", "bytes", "float64", "waits")


@dataclass(frozen=True)
class Count:
    """What a device was asked to do.

    Attributes:
        launches: operators that are no views.
        bytes: what these read and write.
        float64: those with a float64 tensor of a dimension or more.
        waits: those for which the host waits.
        operators: the launched ones by their names, to look at.
    """

    launches: int = 0
    bytes: int = 0
    float64: int = 0
    waits: int = 0
    operators: Counter[str] = field(default_factory=Counter, compare=False)

    def __sub__(self, other: Count) -> Count:
        operators = Counter(self.operators)
        operators.subtract(other.operators)
        left = {name: number for name, number in operators.items() if number}
        numbers = {name: getattr(self, name) - getattr(other, name) for name in NUMBERS}
        return Count(**numbers, operators=Counter(left))


def count(work: Callable[[], object]) -> Count:
    """Run `work` inside `pretend_device` and count what the device was asked to do."""
    numbers, operators = dict.fromkeys(NUMBERS, 0), Counter[str]()

    def observe(func: Any, given: Any, made: Any) -> None:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.is_view or name in NO_KERNEL:
            return
        tensors = [leaf for leaf in pytree.tree_leaves((given, made)) if isinstance(leaf, torch.Tensor)]
        numbers["launches"] += 1
        numbers["bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        numbers["float64"] += any(tensor.dtype == torch.float64 and tensor.dim() > 0 for tensor in tensors)
        numbers["waits"] += name in WAITS or _comes_back(name, given, made)
        operators[name] += 1

    pretend_device.OBSERVERS.append(observe)
    try:
        work()
    finally:
        pretend_device.OBSERVERS.remove(observe)
    return Count(**numbers, operators=operators)


def _comes_back(name: str, given: Any, made: Any) -> bool:
    """Whether a copy goes from the device to the CPU."""
    if name not in ("_to_copy", "copy_") or made.device.type == DEVICE:
        return False
    return any(isinstance(leaf, pretend_device.Pretend) for leaf in pytree.tree_leaves(given))
