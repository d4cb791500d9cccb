"""WeightMark: whether a weight still has the values from which something was computed."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from ..distributed.sharding import local
from .exact_merge import BITS


class WeightMark(NamedTuple):
    """Tells whether a weight, or this rank's shard of it, was written to after it was marked.

    torch counts most writes, but not those through `.data`, NumPy or a fused optimizer. On the CPU, sums of the
    weight's bits show these too; the sums take a sixth of the time of W @ A.T. On other devices the sums would make the
    host wait for the device, so there a write that torch does not count stays unseen.
    """

    weight: weakref.ref[torch.Tensor]  # no id: another tensor may get the id of a tensor that is gone
    pointer: int
    stride: tuple[int, ...]
    version: int  # torch's count of writes
    dim: int
    sums: torch.Tensor | None  # of the bits over `dim`; None where they would be slow

    def is_of(self, weight: torch.Tensor) -> bool:
        """Return whether `weight` is the marked weight and has the values that it had then."""
        if self.weight() is not weight or weight.is_inference():
            return False
        part = local(weight)
        if self.pointer != part.data_ptr() or self.version != part._version or self.stride != part.stride():
            return False
        return self.sums is None or torch.equal(self.sums, bit_sums(part, self.dim))

    def sees_every_write(self) -> bool:
        """Return whether the mark shows writes that torch does not count."""
        return self.sums is not None


def mark_of(weight: torch.Tensor, dim: int = 1) -> WeightMark | None:
    """Mark the present values of a weight. Return None for an inference tensor, whose writes torch does not count.

    Args:
        weight: any shape; it may be sharded or quantised.
        dim: dimension over which the bits are summed. Two values that are exchanged along it stay unseen.
    """
    if weight.is_inference():
        return None
    part = local(weight)
    plain = type(part) is torch.Tensor and part.is_floating_point() and part.dim() > 1
    sums = bit_sums(part, dim) if plain and part.device.type == "cpu" else None
    return WeightMark(weakref.ref(weight), part.data_ptr(), part.stride(), part._version, dim, sums)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether results computed from a tensor belong to a transform of torch.func and cannot be kept."""
    try:
        tensor.detach().data_ptr()
    except RuntimeError:  # the transform's tensors have no memory of their own
        return True
    return False


def bit_sums(part: torch.Tensor, dim: int) -> torch.Tensor:
    """Return sums of the bits of part.flatten(1) over `dim`, read as 64-bit words where the memory allows them."""
    matrix = part if part.dim() == 2 else part.flatten(1)
    size = matrix.element_size()
    if not matrix.numel():  # a rank's shard may be empty; torch cannot view an empty tensor as words
        return matrix.new_empty(0, dtype=torch.int64)
    fits_words = matrix.is_contiguous() and matrix.shape[1] * size % 8 == 0 and matrix.data_ptr() % 8 == 0
    integers = torch.int64 if fits_words else BITS[size]
    return matrix.view(integers).sum(dim, dtype=integers)
