"""Tensor parallelism: place the factors so that their product needs no collective.

    columnwise  W (out, in) split by out:  A whole, B split by out;  x whole, outputs split like the base's
    rowwise     W split by in:             A split by in, B whole;   x split, outputs partial sums like the base's

parallelize_module places the factors in other ways. In a columnwise layer it also splits A along the rank. In a rowwise
layer it splits neither A nor B. Both ways cost a collective for each layer and step. DTensor's own operators would also
gather the partial sums between A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Dims = Mapping[int, tuple[str, int]]


def place_like_weight(name: str, factor: nn.Parameter, weight: torch.Tensor, dims: Dims) -> nn.Parameter:
    """Return a factor, split over the ranks like the weight of its layer.

    Args:
        name: "lora_A" or "lora_B".
        factor: the factor. A factor that is not sharded is returned unchanged.
        weight: the layer's weight.
        dims: for each dimension of the weight that a factor shares: (name of the factor, dimension of the factor).
    """
    if not isinstance(factor, DTensor) or not isinstance(weight, DTensor) or factor.device_mesh != weight.device_mesh:
        return factor
    placements = _placements(name, weight, dims)
    if factor.placements == placements:
        return factor
    moved = cast(DTensor, factor.detach()).redistribute(placements=placements)
    return nn.Parameter(moved, requires_grad=factor.requires_grad)


def split_like(name: str, factor: torch.Tensor, weight: torch.Tensor, dims: Dims) -> torch.Tensor:
    """Return a factor that each rank has whole, split like the weight. Nothing is sent. Arguments as above."""
    if not isinstance(weight, DTensor):
        return factor
    mesh = weight.device_mesh
    whole = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=_placements(name, weight, dims))


def _placements(name: str, weight: DTensor, dims: Dims) -> tuple[Placement, ...]:
    split = [dims.get(p.dim, ("", 0)) if isinstance(p, Shard) else ("", 0) for p in weight.placements]
    return tuple(Shard(dim) if factor_name == name else Replicate() for factor_name, dim in split)


def low_rank_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """Return x @ A.T @ B.T, computed by each rank on its own shards. Return None if it needs communication."""
    if not isinstance(x, DTensor) or not isinstance(a, DTensor) or not isinstance(b, DTensor):
        return None
    last = x.dim() - 1
    cases = [_case(*placements, last) for placements in zip(x.placements, a.placements, b.placements, strict=True)]
    if None in cases:
        return None
    out, grad_x, grad_a, grad_b = zip(*(case for case in cases if case is not None), strict=True)
    hidden = F.linear(x.to_local(grad_placements=grad_x), _shard(a, grad_a))
    product = F.linear(hidden, _shard(b, grad_b))
    shape = torch.Size((*x.shape[:-1], b.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(product, x.device_mesh, out, run_check=False, shape=shape, stride=stride)


def sum_partials(x: torch.Tensor) -> torch.Tensor:
    """Add up partial sums over the ranks. Collective where there are any."""
    if not isinstance(x, DTensor) or not any(placement.is_partial() for placement in x.placements):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def _case(x: Placement, a: Placement, b: Placement, last: int) -> tuple[Placement, ...] | None:
    """Return the placements of the product and of the gradients of x, A and B, or None if communication is needed.

    Partial means that the values still have to be summed over the ranks.

    Args:
        x, a, b: placements of x, A and B on one dimension of the mesh.
        last: number of the last dimension of x.
    """
    if (a, b) == (Replicate(), Shard(0)) and x == Replicate():  # columnwise
        return Shard(last), Partial(), Partial(), Shard(0)
    if (a, b) == (Shard(1), Replicate()) and x == Shard(last):  # rowwise
        return Partial(), Shard(last), Shard(1), Partial()
    if (a, b) == (Replicate(), Replicate()) and isinstance(x, Shard) and x.dim != last:  # x is split by rows
        return x, x, Partial(), Partial()
    return (Replicate(),) * 4 if x == a == b == Replicate() else None


def _shard(factor: DTensor, grad: tuple[Placement, ...]) -> torch.Tensor:
    """Return this rank's shard of a factor. In backward, redistribute sums the partial gradient, once."""
    return factor.redistribute(placements=factor.placements).to_local(grad_placements=grad)
