"""W' = round(c * (W + s * B @ A)) on a device that is not the CPU: few passes over W, no float64 for 16 bits.

All tensors are stacks (n, ...) of n weights of one shape, which need as many operators as one weight.

A sum of two dtypes is computed in the wider one and rounded once, in one pass, without a copy of W in the wider dtype.
Weights of 32 bits or more are summed in float64. Weights of 16 bits are summed in float32, because a GPU for consumers
runs float64 at 1/64 of the speed.

In float32, B @ A has the errors of k sums, so that too many elements of large adapters are rounded wrongly. There the
factors are split into a coarse and a fine part. The coarse parts hold few bits, so that their product is exact; the
errors of the fine product are 2**9 times smaller. For bfloat16, D is the sum of both, rounded to float32 once. For
float16, which has 3 bits more, W is added to the coarse product first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

MANTISSA = 24  # bits of a float32
# Where one product in float32 is near enough for bfloat16: 7 in 100,000 values are rounded wrongly.
PLAIN_RANK, PLAIN_ELEMENTS = 16, 100_000

Pair = tuple[torch.Tensor, torch.Tensor]


class Block(Protocol):
    """What is read of a LowRankBlock (nn/low_rank.py)."""

    @property
    def left(self) -> torch.Tensor: ...  # (rows, k)
    @property
    def right(self) -> torch.Tensor: ...  # (k, columns)
    @property
    def scale(self) -> torch.Tensor | None: ...  # c: (rows, 1) or (1, columns)
    @property
    def replaces(self) -> bool: ...  # values of W that are not finite count as 0


class DeviceSum:
    """The sum of a stack of weights, or of parts of weights, with one low-rank block each.

    Args:
        blocks: one for each weight, with factors of one shape, dtype and device.
        scaling: s.
        dtype: of the weights.
    """

    def __init__(self, blocks: Sequence[Block], scaling: float, dtype: torch.dtype) -> None:
        first = blocks[0]
        wide = _wide(first, dtype)
        left = _stacked([block.left for block in blocks]).to(wide)
        right = _stacked([block.right for block in blocks]).to(wide)
        if wide == torch.float32 and _needs_split(dtype, left, right):
            self.parts = _split(left, right, scaling)
        else:
            self.parts = [(left * scaling, right)]
        scales = [block.scale for block in blocks if block.scale is not None]
        self.scale = _stacked(scales).to(wide) if scales else None
        self.replaces, self.dtype, self.wide = first.replaces, dtype, wide

    def delta(self) -> torch.Tensor:
        """Return D = s * B @ A as (n, rows, columns), in the dtype of the arithmetic; the same bits each time."""
        (left, right), *fine = self.parts
        delta = torch.mm(left[0], right[0]).unsqueeze(0) if len(left) == 1 else torch.bmm(left, right)
        for pair in fine:
            delta.baddbmm_(*pair)
        return delta

    def exact(self, weights: torch.Tensor) -> torch.Tensor:
        """Return W' before it is rounded, in the dtype of the arithmetic."""
        exact = self._finite(weights).to(self.wide, copy=True, memory_format=torch.contiguous_format)
        matrices = exact.view(len(exact), self.parts[0][0].shape[1], -1)
        if self.wide == weights.dtype:  # no wider dtype to sum in: one rounding needs D first
            matrices.add_(self.delta())
        else:
            for left, right in self.parts:
                matrices.baddbmm_(left, right)
        if self.scale is not None:
            matrices.mul_(self.scale)
        return exact

    def rounded(self, weights: torch.Tensor, out: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Write W', rounded once, into `out`, which may be `weights`, and return `out`.

        Args:
            weights: W.
            out: the same shape, in the dtype of the result.
            delta: the result of `delta`, if the caller has it.
        """
        if not self.is_added() or out.dtype != self.dtype:
            return out.copy_(self.exact(weights))
        delta = self.delta() if delta is None else delta
        return torch.add(self._finite(weights), delta.view(weights.shape), out=out)

    def is_added(self) -> bool:
        """Return whether W' is round(W + D), for which `exact` is not needed."""
        return self.scale is None and (self.dtype != torch.float16 or len(self.parts) == 1)

    def taken_out(self, merged: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return what unmerging computes before it corrects values: round(W' / c - D).

        Args:
            merged: W', rounded.
            delta: the result of `delta`.
        """
        back = torch.empty_like(merged, memory_format=torch.contiguous_format)
        if self.scale is not None:
            merged = merged.reshape(delta.shape) / self.scale
        return torch.sub(merged.reshape(back.shape), delta.view(back.shape), out=back)

    def _finite(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.masked_fill(~weights.isfinite(), 0.0) if self.replaces else weights


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (n, ...); of one tensor a view."""
    tensors = [tensor.detach() for tensor in tensors]
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _wide(block: Block, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic.

    The differences of replaced rows stay in float64: where a new value is far smaller than the old one, float32 would
    lose its bits.
    """
    if block.left.device.type == "mps":  # it has no float64
        return torch.float32
    return torch.float32 if dtype.itemsize == 2 and not block.replaces else torch.float64


def _needs_split(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> bool:
    rows, rank, columns = left.shape[1], *right.shape[1:]
    is_large = rank > PLAIN_RANK or rows * columns >= PLAIN_ELEMENTS
    return dtype == torch.float16 or (dtype == torch.bfloat16 and is_large)


def _split(left: torch.Tensor, right: torch.Tensor, scaling: float) -> list[Pair]:
    """Split scaling * left @ right into two products of float32 factors. The first product is exact.

    Args:
        left: (n, rows, k), float32.
        right: (n, k, columns), float32.
        scaling: any number; what rounding of scaling * left loses is added to the fine part.
    """
    rows = left.shape[1]
    bits = (MANTISSA - math.ceil(math.log2(max(left.shape[2], 1)))) // 2  # of each factor, so that k products fit
    both = torch.cat([left * scaling, right.mT], 1)
    large = torch.linalg.vector_norm(both, math.inf, 2, keepdim=True) * 2.0 ** (MANTISSA - bits)
    coarse = (both + large) - large  # multiples of one step in each row, about 2**-bits of its largest value
    fine = both - coarse
    coarse_left, fine_left = coarse[:, :rows], fine[:, :rows]
    if math.frexp(scaling)[0] not in (0.5, -0.5, 0.0):  # no power of two
        fine_left = _scaled(left, scaling, coarse_left)
    fine_right = torch.cat([fine[:, rows:], both[:, rows:]], 2).mT
    return [(coarse_left, coarse[:, rows:].mT), (torch.cat([coarse_left, fine_left], 2), fine_right)]


def _scaled(left: torch.Tensor, scaling: float, coarse: torch.Tensor) -> torch.Tensor:
    """Return scaling * left - coarse in float32. Both factors are cut to 12 bits, which makes the product exact."""
    mantissa, exponent = math.frexp(scaling)
    head_of_scaling = math.ldexp(round(math.ldexp(mantissa, MANTISSA // 2)), exponent - MANTISSA // 2)
    large = left * (2.0 ** (MANTISSA // 2) + 1)
    head = large - (large - left)
    fine = (head * head_of_scaling).sub_(coarse).add_(head, alpha=scaling - head_of_scaling)
    return fine.add_(left - head, alpha=scaling)
