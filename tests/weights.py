"""Weights, factors and a float64 reference for tests of the merge arithmetic."""

from __future__ import annotations

import math

import torch

from lightning_lora.nn.low_rank import LowRankBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARES = (0.001, 0.01, 0.1, 1.0)  # the adapter's norm over the weight's


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bits(one), as_bits(other))


def make_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Usual values, and where the arithmetic is delicate: -0.0, subnormals, the smallest normal, 0."""
    weight = (0.02 * torch.randn(shape)).to(dtype)
    info = torch.finfo(dtype)
    delicate = [-0.0, 0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.smallest_normal, 1.0]
    flat = weight.view(-1)
    count = min(len(delicate), flat.numel())
    flat[torch.randperm(flat.numel())[:count]] = torch.tensor(delicate[:count], dtype=dtype)
    return weight


def make_pieces(weight: torch.Tensor, r: int = 4) -> list[LowRankBlock]:
    rows = weight.shape[0]
    return [LowRankBlock(0, 0, torch.randn(rows, r), torch.randn(r, weight.numel() // rows))]


def exact_delta(pieces: list[LowRankBlock], scaling: float, shape: torch.Size) -> torch.Tensor:
    delta = torch.zeros(shape[0], shape.numel() // shape[0], dtype=torch.float64)
    for row, col, left, right in pieces:
        part = scaling * (left.double() @ right.double())
        delta[row : row + part.shape[0], col : col + part.shape[1]] += part
    return delta.view(shape)


def scaling_for(weight: torch.Tensor, pieces: list[LowRankBlock], share: float) -> float:
    return float(share * weight.double().norm() / exact_delta(pieces, 1.0, weight.shape).norm())


def nearest(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where no neighbour of `found` in its dtype is nearer to the float64 value `wanted`."""
    error = (found.double() - wanted).abs()
    neighbours = [(as_bits(found) + step).view(found.dtype).double() for step in (1, -1)]
    others = [torch.where(n.isnan(), math.inf, (n - wanted).abs()) for n in neighbours]
    return (error <= others[0]) & (error <= others[1])


def assert_rounded_sum(found: torch.Tensor, weight: torch.Tensor, pieces: list[LowRankBlock], scaling: float) -> None:
    """W + s * B @ A, off by half the spacing of its dtype, and by float64's own rounding of the terms."""
    info = torch.finfo(found.dtype)
    wanted = weight.double() + exact_delta(pieces, scaling, weight.shape)
    magnitudes = [p._replace(left=p.left.abs(), right=p.right.abs()) for p in pieces]
    terms = weight.double().abs() + exact_delta(magnitudes, abs(scaling), weight.shape)
    spacing = info.eps * torch.clamp(wanted.abs(), min=info.smallest_normal)
    assert ((found.double() - wanted).abs() <= spacing / 2 + 16 * torch.finfo(torch.float64).eps * terms).all()
