"""One layer of several adapters in one: their changes summed, pruned or voted on. combine.py lists the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..errors import LoRAError
from ..names import A, B
from .adapter import Adapter
from .lora_form import Pair, padded
from .measures import scaled_pairs
from .products import product_svd, truncated_svd

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
OTHER_NAMES = {"dare": "dare_linear"}  # as DARE's paper calls the sum of what it leaves
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
CUT = ("svd", *PRUNING)  # methods whose result has a rank that the user chooses
ROUNDING = torch.finfo(torch.float32).eps  # singular values below this share of the largest one count as zero


def same_in_all(what: str, values: Sequence[tuple[str, Any]]) -> Any:
    """Return the value that all adapters have. LoRAError names two adapters with different values."""
    (first_name, first), *others = values
    for name, value in others:
        if value != first:
            raise LoRAError(f"combine: {what} is {first!r} in {first_name} and {value!r} in {name}.")
    return first


def combine_layer(
    layer: str,
    holders: Sequence[tuple[str, Adapter, float]],
    how: str,
    rank: float | None,
    density: float,
    draw: torch.Generator,
) -> tuple[dict[str, torch.Tensor], float]:
    """Combine the changes of one layer.

    Args:
        layer: its name.
        holders: the adapters of the layer as plain LoRA, each with its name and weight.
        how: a method without peft's ending "_svd".
        rank: of the result, or None for the largest of the adapters. Below 1 it is the share of the squared singular
            values that the rank keeps at least, of a stack in each matrix.
        density: the share of values that the methods that prune keep.
        draw: what the dare methods draw from.

    Returns:
        A and B by name, and the share of the squared norm of the combined change that they keep.
    """
    names, adapters, weights = zip(*holders, strict=True)
    kinds = [(name, each.layers[layer].kind) for name, each in zip(names, adapters, strict=True)]
    known = [(name, kind) for name, kind in kinds if kind]
    same_in_all(f"the kind of {layer!r}", known) if known else None
    factors = [(each.factor(layer, A), each.factor(layer, B)) for each in adapters]
    shapes = [(len(b), *a.shape[1:]) for a, b in factors]
    same_in_all(f"the shape of {layer!r}", list(zip(names, shapes, strict=True)))
    is_double = torch.float64 in {factor.dtype for pair in factors for factor in pair}
    dtype = torch.float64 if is_double else torch.float32
    rank = rank or max(b.shape[1] for _, b in factors)
    pairs, norms = [], []
    for matrix in zip(*(scaled_pairs(each, layer) for each in adapters), strict=True):  # of a stack, each expert's
        pair, norm = _combine_matrix(list(zip(matrix, weights, strict=True)), how, rank, density, draw, dtype)
        pairs.append(pair)
        norms.append(norm)
    r = max(left.shape[1] for left, _ in pairs)
    lefts, rights = zip(*(padded(pair, r) for pair in pairs), strict=True)
    a, b = factors[0]
    combined = {
        adapters[0].factor_name(layer, A): torch.cat(rights).to(dtype).reshape(-1, *a.shape[1:]).contiguous(),
        adapters[0].factor_name(layer, B): torch.cat(lefts).to(dtype).reshape(-1, r, *b.shape[2:]).contiguous(),
    }
    for name, factor in combined.items():
        if not factor.isfinite().all():
            raise LoRAError(f"combine: {name!r} is beyond the range of {dtype}; use smaller weights.")
    kept, whole = sum(kept for kept, _ in norms), sum(whole for _, whole in norms)
    return combined, kept / whole if whole else 1.0


def _combine_matrix(
    weighted: Sequence[tuple[Pair, float]],
    how: str,
    rank: float,
    density: float,
    draw: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Pair, tuple[float, float]]:
    """Return the combined pair of one matrix, and its squared norm with and before the cut to a rank.

    Methods that prune build the changes in the result's dtype.
    """
    left = torch.cat([left for (left, _), _ in weighted], 1)
    right = torch.cat([right * weight for (_, right), weight in weighted])
    if how == "cat":
        return (left, right), (1.0, 1.0)
    if how in PRUNING:
        changes = [(left @ right).to(dtype) for (left, right), _ in weighted]
        change = combined_change(changes, [weight for _, weight in weighted], how, density, draw)
        u, values, vh = (tensor.double() for tensor in truncated_svd(change, int(rank)))
        whole = change.double().square().sum()
    else:
        u, values, vh = product_svd(left, right)
        whole = values.square().sum()
        if how == "linear":  # no lower than an adapter's, so that training can go on
            rank = max(int((values > ROUNDING * values[0]).sum()), rank)
    if rank < 1:
        rank = int((values.square().cumsum(0) < rank * whole).sum()) + 1
    rank = int(rank)
    u, values, vh = u[:, :rank], values[:rank], vh[:rank]
    return (u * values, vh), (float(values.square().sum()), float(whole))


def combined_change(
    changes: Sequence[torch.Tensor], weights: Sequence[float], how: str, density: float, draw: torch.Generator
) -> torch.Tensor:
    """Prune the changes of several adapters and add them, matrices of one shape.

    Args:
        changes: s * B @ A of each.
        weights: a number for each.
        how: one of PRUNING.
        density: the share of each change's values that is kept.
        draw: what the dare methods draw from, change after change.
    """
    pruned = []
    for change in changes:
        if how.startswith("dare"):  # a random part, enlarged so that the expectation stays
            part = change * torch.bernoulli(torch.full_like(change, density), generator=draw) / density
        else:  # the largest values
            kept = change.abs().flatten().topk(int(density * change.numel())).indices
            part = torch.zeros_like(change).flatten().index_copy(0, kept, change.flatten()[kept]).view_as(change)
        pruned.append(part)
    total = torch.zeros_like(pruned[0])
    if not how.endswith("ties"):
        for weight, each in zip(weights, pruned, strict=True):
            total += weight * each
        return total
    elected = torch.where(sum(pruned, torch.zeros_like(total)) >= 0, 1, -1)
    agreeing = torch.zeros_like(total)
    for weight, each in zip(weights, pruned, strict=True):
        agrees = each.sign() == elected
        total += weight * each * agrees
        agreeing += agrees
    return total / agreeing.clamp(min=1)
