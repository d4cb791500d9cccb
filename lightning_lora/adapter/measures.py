"""How large an adapter's changes are, and how two adapters differ: norms of s * B @ A, never built."""

from __future__ import annotations

import math

import torch

from ..errors import LoRAError
from ..nn.low_rank import TRANSPOSED_EXPERTS
from .adapter import Adapter
from .lora_form import Pair
from .products import product_norm


def delta_norm(adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of s * B @ A of one layer; without options, of B @ A. A scale does not count."""
    return math.hypot(*(product_norm(left, right) for left, right in scaled_pairs(adapter, name)))


def difference_norm(adapter: Adapter, other_adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of the difference between two adapters' s * B @ A of one layer.

    Raises:
        ValueError: the layer has other parts, shapes or layouts in the two.
    """
    norms = []
    for (left, right), (other_left, other_right) in _matching_pairs(adapter, other_adapter, name):
        if left.shape == other_left.shape and torch.equal(left, other_left) and torch.equal(right, other_right):
            norms.append(0.0)
        else:
            norms.append(product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right])))
    return math.hypot(*norms)


def _matching_pairs(adapter: Adapter, other_adapter: Adapter, name: str) -> list[tuple[Pair, Pair]]:
    """Return the scaled_pairs of one layer in two adapters, part by part; ValueError where they do not match."""
    both = adapter, other_adapter
    old = [each.peft_version is not None and each.layers[name].kind == TRANSPOSED_EXPERTS for each in both]
    if any(old) and adapter.layers[name].kind != other_adapter.layers[name].kind:
        raise ValueError(f"{name!r} has another layout in the two, because a PEFT before 0.19 wrote one of them")
    enabled = [each.layers[name].parts for each in both]
    pairs, other_pairs = (scaled_pairs(each, name) for each in both)
    if len(pairs) != len(other_pairs) or (None not in enabled and enabled[0] != enabled[1]):
        raise ValueError(f"{name!r} has other parts in the two")
    matching = list(zip(pairs, other_pairs, strict=True))
    for (left, right), (other_left, other_right) in matching:
        if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
            raise ValueError(f"{name!r} has other shapes in the two")
    return matching


def scaled_pairs(adapter: Adapter, name: str) -> list[Pair]:
    """Return (s * B, A) of each part of a layer (an expert, an adapted part), as matrices in float64.

    s is 1 where the source does not hold it.

    Raises:
        LoRAError: the factors do not fit each other.
    """
    a, b, _ = adapter.effective_factors(name)
    a, b = (factor.detach().double().flatten(1) for factor in (a, b))
    scaling = adapter.scaling(name)
    parts = a.shape[0] // b.shape[1]
    if a.shape[0] % b.shape[1] or not parts or b.shape[0] % parts:
        raise LoRAError(
            f"adapter: the factors of {name!r} do not fit each other: lora_A has {a.shape[0]} rows, and lora_B "
            f"{b.shape[0]} rows of {b.shape[1]} values. The file is damaged."
        )
    return [(left * scaling, right) for left, right in zip(b.chunk(parts), a.chunk(parts), strict=True)]
