"""WeightMark: whether a weight still has the values that something was computed from."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from ..distributed.sharding import local
from .bits import BITS


class WeightMark(NamedTuple):
    """What tells whether a weight, or this rank's part of it, was written to.

    torch does not count what is written through `.data`, NumPy or a fused optimizer. On the CPU sums of the weight's
    bits show that, for a sixth of the time that its product with A takes. Elsewhere they would wait for the device, so
    that there such a write is not seen.
    """

    weight: weakref.ref[torch.Tensor]  # not its id, which another tensor may get once it is gone
    pointer: int
    stride: tuple[int, ...]
    version: int
    dim: int
    sums: torch.Tensor | None

    def is_of(self, weight: torch.Tensor) -> bool:
        """Return whether a weight has the values that it had when it was marked."""
        if self.weight() is not weight or weight.is_inference():
            return False
        part = local(weight)
        if self.pointer != part.data_ptr() or self.version != part._version or self.stride != part.stride():
            return False
        return self.sums is None or torch.equal(self.sums, _bit_sums(part, self.dim))

    def sees_every_write(self) -> bool:
        """Return whether a write that torch does not count shows too."""
        return self.sums is not None


def mark_of(weight: torch.Tensor, dim: int = 1) -> WeightMark | None:
    """Return the mark of a weight as it is now, or None where torch counts no writes, as in inference mode.

    Args:
        weight: of any shape, perhaps sharded or quantised.
        dim: over which the bits are summed; values that change places along it are not told apart.
    """
    if weight.is_inference():
        return None
    part = local(weight)
    plain = type(part) is torch.Tensor and part.is_floating_point() and part.dim() > 1
    sums = _bit_sums(part, dim) if plain and part.device.type == "cpu" else None
    return WeightMark(weakref.ref(weight), part.data_ptr(), part.stride(), part._version, dim, sums)


def _bit_sums(part: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sums of the bits of a matrix, or of what flatten(1) makes one, as whole words where these fit."""
    matrix = part if part.dim() == 2 else part.flatten(1)
    size = matrix.element_size()
    if not matrix.numel():  # of a rank that has none of the rows; torch cannot view it as words
        return matrix.new_empty(0, dtype=torch.int64)
    fits_words = matrix.is_contiguous() and matrix.shape[1] * size % 8 == 0 and matrix.data_ptr() % 8 == 0
    integers = torch.int64 if fits_words else BITS[size]
    return matrix.view(integers).sum(dim, dtype=integers)
