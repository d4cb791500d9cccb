"""Norms of adapters and of what differs between two, from the factors alone: B @ A is never built."""

from __future__ import annotations

import math

import torch

from .adapter import Adapter
from .base import A, B
from .kinds import SEPARATE, stand_in

Pair = tuple[torch.Tensor, torch.Tensor]


def delta_norm(adapter: Adapter, name: str) -> float:
    """The Frobenius norm of s * B @ A of one layer; without options, of B @ A."""
    return _norm([_product_norm(left, right) for left, right in scaled_pairs(adapter, name)])


def difference_norm(one: Adapter, other: Adapter, name: str) -> float:
    """The Frobenius norm of the difference between two adapters' s * B @ A of one layer.

    Raises:
        ValueError: the layer has other parts or shapes in the two.
    """
    ours, theirs = scaled_pairs(one, name), scaled_pairs(other, name)
    norms = []
    for (left, right), (other_left, other_right) in zip(ours, theirs, strict=True):
        if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
            raise ValueError(f"{name!r} has other shapes in the two")
        if left.shape == other_left.shape and torch.equal(left, other_left) and torch.equal(right, other_right):
            norms.append(0.0)
        else:
            norms.append(_product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right])))
    return _norm(norms)


def scaled_pairs(adapter: Adapter, name: str) -> list[Pair]:
    """(s * B, A) of each part of a layer, as matrices in float64."""
    a, b = (adapter.tensors[f"{name}.{leaf}"].detach().double().flatten(1) for leaf in (A, B))
    scaling = adapter.scalings.get(name, 1.0)
    shapes = {leaf: adapter.fingerprint[f"{name}.{leaf}"]["shape"] for leaf in SEPARATE if _known(adapter, name, leaf)}
    if adapter.kinds.get(name) == "MultiheadAttention" and shapes:
        enabled = adapter.config.enabled_parts(name) if adapter.config else None
        pieces = stand_in("MultiheadAttention", shapes, b.shape[1], enabled).pieces(a, b)
        return [(piece.left * scaling, piece.right) for parts in pieces.values() for piece in parts]
    parts = a.shape[0] // b.shape[1]
    return [(left * scaling, right) for left, right in zip(b.chunk(parts), a.chunk(parts), strict=True)]


def _known(adapter: Adapter, name: str, leaf: str) -> bool:
    return f"{name}.{leaf}" in adapter.fingerprint


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left @ right| from two small triangles: exact to float64 also where the product nearly cancels."""
    tall, wide = torch.linalg.qr(left, mode="r")[1], torch.linalg.qr(right.T, mode="r")[1]
    return float(torch.linalg.matrix_norm(tall @ wide.T))


def _norm(parts: list[float]) -> float:
    return math.hypot(*parts)
