"""One layer of several adapters in one: their changes summed, pruned or voted on. combine.py lists the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..errors import LoRAError
from ..names import A, B, parameter_factor_name
from ..nn.low_rank import CONVOLUTIONS, to_block_diagonal
from .adapter import Adapter
from .measures import scaled_pairs
from .products import product_svd, truncated_svd

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
OTHER_NAMES = {"dare": "dare_linear"}  # as DARE's paper calls the sum of what it leaves
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
CUT = ("svd", *PRUNING)  # methods whose result has a rank that the user chooses
ROUNDING = torch.finfo(torch.float32).eps  # singular values below this share of the largest one count as zero

Pair = tuple[torch.Tensor, torch.Tensor]  # left (m, r), right (r, n); in float64


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
    rank: int | None,
    density: float,
    draw: torch.Generator,
) -> tuple[dict[str, torch.Tensor], float]:
    """Combine the changes of one layer.

    Args:
        layer: its name.
        holders: the adapters of the layer, each with its name and weight.
        how: a method without peft's ending "_svd".
        rank: of the result, or None for the largest of the adapters.
        density: the share of values that the methods that prune keep.
        draw: what the dare methods draw from.

    Returns:
        A and B by name, and the share of the squared norm of the combined change that they keep.
    """
    _, first, _ = holders[0]
    known = [(name, each.layers[layer].kind) for name, each, _ in holders if each.layers[layer].kind]
    same_in_all(f"the kind of {layer!r}", known) if known else None
    plain = [(name, _plain_parts(each, layer, holders), weight) for name, each, weight in holders]
    _check_shapes(layer, [(name, each, parts) for (name, parts, _), (_, each, _) in zip(plain, holders, strict=True)])
    largest = max(parts[0][0].shape[1] for _, parts, _ in plain)
    dtypes = [tensor.dtype for _, each, _ in holders for tensor in each.stored(layer).values()]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    pairs, norms = [], []
    for part in range(len(plain[0][1])):
        weighted = [(parts[part], weight) for _, parts, weight in plain]
        pair, share = _combine_part(weighted, how, rank or largest, density, draw, dtype)
        pairs.append(pair)
        norms.append(share)
    r = max(left.shape[1] for left, _ in pairs)
    lefts, rights = zip(*(padded(pair, r) for pair in pairs), strict=True)
    kernel = _inputs(first, layer)
    a, b = torch.cat(rights), torch.cat(lefts)
    factors = {
        _plain_name(first, layer, A): a.to(dtype).reshape(-1, *kernel).contiguous(),
        _plain_name(first, layer, B): b.to(dtype).reshape(-1, r, *[1] * (len(kernel) - 1)).contiguous(),
    }
    for name, factor in factors.items():
        if not factor.isfinite().all():
            raise LoRAError(f"combine: {name!r} is beyond the range of {dtype}; use smaller weights.")
    kept, whole = sum(kept for kept, _ in norms), sum(whole for _, whole in norms)
    return factors, kept / whole if whole else 1.0


def _plain_name(adapter: Adapter, layer: str, leaf: str) -> str:
    """Return the name of A or B of a layer in the result, which is plain LoRA."""
    if not adapter.is_parameter(layer):
        return f"{layer}.{leaf}"
    module, dot, parameter = layer.rpartition(".")
    return module + dot + parameter_factor_name(parameter, leaf)


def _inputs(adapter: Adapter, layer: str) -> list[int]:
    """Return the shape of a row of plain LoRA's A. For a convolution whose kernel is known it is (in, k...)."""
    info, inputs = adapter.layer_info(layer), list(adapter.effective_factors(layer).a.shape[1:])
    is_flat = info.kind in CONVOLUTIONS and len(inputs) == 1 and info.shape
    return list(info.shape[1:]) if is_flat else inputs


def _plain_parts(adapter: Adapter, layer: str, holders: Sequence[tuple[str, Adapter, float]]) -> list[Pair]:
    """Return (s * B, A) of each part of a layer. If the adapters adapt different parts, the layer is one part."""
    parts = [(name, each.layers[layer].parts) for name, each, _ in holders]
    enabled = adapter.layers[layer].parts
    if all(part == parts[0][1] for _, part in parts):
        return scaled_pairs(adapter, layer)
    if enabled is None:
        return scaled_pairs(adapter, layer)
    pairs = scaled_pairs(adapter, layer)
    stacked = torch.cat([left for left, _ in pairs])
    return [(to_block_diagonal(stacked, enabled), torch.cat([right for _, right in pairs]))]


def _check_shapes(layer: str, holders: Sequence[tuple[str, Adapter, list[Pair]]]) -> None:
    """Raise LoRAError where adapters have different shapes of a layer."""

    def sizes(adapter: Adapter, parts: list[Pair]) -> list[Any]:
        return [_inputs(adapter, layer), [(left.shape[0], right.shape[1]) for left, right in parts]]

    same_in_all(f"the shape of {layer!r}", [(name, sizes(each, parts)) for name, each, parts in holders])


def _combine_part(
    weighted: Sequence[tuple[Pair, float]],
    how: str,
    rank: int,
    density: float,
    draw: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Pair, tuple[float, float]]:
    """Return the combined pair of one matrix, and its squared norm with and before the cut to a rank.

    Methods that prune build the changes in the result's dtype.
    """
    if how in PRUNING:
        changes = [(left @ right).to(dtype) for (left, right), _ in weighted]
        change = combined_change(changes, [weight for _, weight in weighted], how, density, draw)
        u, values, vh = (tensor.double() for tensor in truncated_svd(change, rank))
        return (u * values, vh), (float(values.square().sum()), float(change.double().square().sum()))
    left = torch.cat([left for (left, _), _ in weighted], 1)
    right = torch.cat([right * weight for (_, right), weight in weighted])
    if how == "cat":
        return (left, right), (1.0, 1.0)
    u, values, vh = product_svd(left, right)
    squares = values.square()
    if how == "linear":  # no lower than an adapter's, so that training can go on
        rank = max(int((values > ROUNDING * values[0]).sum()), min(rank, len(values)))
    cut = slice(min(rank, len(values)))
    return (u[:, cut] * values[cut], vh[cut]), (float(squares[cut].sum()), float(squares.sum()))


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
    random = how.startswith("dare")
    pruned = [_random_part(each, density, draw) if random else _largest_part(each, density) for each in changes]
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


def _largest_part(change: torch.Tensor, density: float) -> torch.Tensor:
    """Return a change with only the largest of its values."""
    kept = change.abs().flatten().topk(int(density * change.numel())).indices
    return torch.zeros_like(change).flatten().index_copy(0, kept, change.flatten()[kept]).view_as(change)


def _random_part(change: torch.Tensor, density: float, draw: torch.Generator) -> torch.Tensor:
    """Return a change with a random part of its values, enlarged so that its expectation stays."""
    return change * torch.bernoulli(torch.full_like(change, density), generator=draw) / density


def padded(pair: Pair, rank: int) -> Pair:
    """Return a pair of a higher rank with the same product: zeros are added. Factors of convolutions keep kernels."""
    left, right = pair
    more = rank - left.shape[1]
    return (
        torch.cat([left, left.new_zeros(len(left), more, *left.shape[2:])], 1),
        torch.cat([right, right.new_zeros(more, *right.shape[1:])]),
    )
