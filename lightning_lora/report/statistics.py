"""adapter_stats: measure how far training has changed the adapters, by groups of layers.

D = s * B @ A is not built. Its norm, its singular values and its product with an earlier D are computed from the (r, r)
matrices A @ A.T and B.T @ B.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..adapter.products import Stack, effective_rank, inner_product, singular_values_of_grams, stack_blocks
from ..distributed.flat import unsharded_shape
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import copy_of, is_sharded, is_spread, local, reshard_
from ..model.adapted_model import open_model
from ..names import factor_role, group_of
from ..nn.adapted_weights import AdaptedWeights


@dataclass(frozen=True)
class GroupStats:
    """Statistics of a group of adapted layers, grouped as in summary. D is the update that a layer adds to W.

    Attributes:
        layers: the number of layers.
        norm: |D| / |W|, Frobenius norms over all layers of the group. None where W is not known, as of a linear layer
            of another library.
        rank: the mean effective rank of D: exp(-sum(p log p)), where p is each singular value over the sum of all (Roy
            & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007). It is from 1 to r,
            and 0 where D is zero. Each expert of a stack and each part of a fused projection counts by itself. None for
            trained rows of a table.
        gradients: norms of the gradients by role, such as "A", "B" or "rows". Roles without a gradient are left out.
        cosine: between D and an earlier D, each taken over all layers as one vector. None without an earlier D, or
            where one of the two is zero.
    """

    layers: int
    norm: float | None
    rank: float | None
    gradients: Mapping[str, float]
    cosine: float | None

    def to_dict(self) -> dict[str, float]:
        """Return the values that are not None, by their names in logs: norm, rank, grad_A, grad_B, cosine."""
        gradients = {f"grad_{role}": norm for role, norm in self.gradients.items()}
        values = {"norm": self.norm, "rank": self.rank, **gradients, "cosine": self.cosine}
        return {name: value for name, value in values.items() if value is not None}


class WeightSquares(NamedTuple):
    """The sum of squares (a scalar) of this rank's part of a weight, and what tells whether it is still right."""

    squares: torch.Tensor
    written: Hashable | None  # see _written

    def is_of(self, weight: nn.Parameter) -> bool:
        """Return whether the sum is still that of this weight, which is frozen and was not written to."""
        return self.written is not None and self.written == _written(weight)


@dataclass(frozen=True)
class Snapshot:
    """Values of an adapted layer, for a comparison with its later values."""

    stored: Mapping[str, torch.Tensor]  # copies of its stored tensors by leaf name, sharded as the live tensors
    squares: float  # of D
    weight: WeightSquares


@dataclass(frozen=True)
class AdapterStats:
    """Statistics by group, as plain types, and snapshots of the layers for a later call. Pickles have no snapshots."""

    groups: Mapping[str, GroupStats]
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups, "snapshots": {}}


@dataclass
class _Measured:
    """Measured values of one layer, first on the factors' device, then on the CPU."""

    values: dict[str, torch.Tensor]  # scalars: "squares" of D, and its "product" with the earlier D
    grams: list[tuple[torch.Tensor, torch.Tensor]]
    partial: dict[str, torch.Tensor]  # scalars of this rank: squares of W, and of gradients by role
    without_gradient: set[str]  # roles without a gradient
    weight: WeightSquares


def adapter_stats(model: nn.Module, previous: AdapterStats | None = None) -> AdapterStats:
    """Measure the adapters of a model and their present gradients. The model is not changed.

    Collective: every rank of a sharded model calls this. All ranks get the same numbers.

    Args:
        model: any module that holds all adapted layers, merged or not.
        previous: the result of an earlier call, for `cosine`. It holds a copy of the factors. The norm of a frozen
            weight is taken from it unless the weight was replaced, merged or written to since. A write through `.data`
            goes unnoticed.

    Returns:
        `groups`: a GroupStats for each group of layers. Its values are NaN where a factor holds NaN.

    Raises:
        LoRAError: the model was not injected.

    Example::

        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> names = inject(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
        >>> model(torch.ones(4, 3, 8)).sum().backward()
        >>> {name: group.norm for name, group in adapter_stats(model).groups.items()}  # B is zero before the first step
        {'linear1': 0.0, 'linear2': 0.0}
    """
    handle = open_model(model, "adapter_stats")
    reshard_(module for _, module in handle.modules)
    layers = handle.layers
    return layer_stats(layers, previous.snapshots if previous else {})


def layer_stats(layers: Mapping[str, AdaptedWeights], previous: Mapping[str, Snapshot]) -> AdapterStats:
    """Measure some adapted layers, see adapter_stats. Collective.

    Args:
        layers: by name, with their shards in place.
        previous: earlier snapshots by name.
    """
    if not layers:
        return AdapterStats({})
    with torch.inference_mode(False), torch.no_grad():
        sync = RankSync(t for each in layers.values() for t in (*each.stored().values(), each.adapted_weight()))
        measured = {name: _measure(layer, previous.get(name), sync) for name, layer in layers.items()}
        _to_cpu(measured.values())
        _sum_over_ranks(measured.values(), sync)
        groups: dict[str, list[str]] = {}
        for name in layers:
            groups.setdefault(group_of(name), []).append(name)
        return AdapterStats(
            {
                group: _group_stats({name: measured[name] for name in names}, previous)
                for group, names in groups.items()
            },
            {name: _snapshot(layer, measured[name]) for name, layer in layers.items()},
        )


def _measure(layer: AdaptedWeights, before: Snapshot | None, sync: RankSync) -> _Measured:
    stored, square = layer.stored(), layer.lora.spec.scaling**2
    stacks = _stacks(layer, stored)
    grams = [stack.grams() for stack in stacks]
    values = {"squares": _sum((left * right).sum() for left, right in grams) * square}
    if before is not None and _are_alike(before.stored, stored):
        values["product"] = inner_product(stacks, _stacks(layer, before.stored)) * square
    weight = _weight_squares(layer, before)
    partial = {"W": weight.squares * sync.share(layer.adapted_weight())}
    roles = {factor_role(leaf): stored[leaf] for leaf in layer.lora.spec.variant.trained}
    partial |= {role: _squares_of_gradient(factor, sync) for role, factor in roles.items()}
    return _Measured(
        values,
        [] if layer.replaced_rows() else grams,
        partial,
        {role for role, factor in roles.items() if factor.grad is None},
        weight,
    )


def _weight_squares(layer: AdaptedWeights, before: Snapshot | None) -> WeightSquares:
    weight = layer.adapted_weight()
    if before is not None and before.weight.is_of(weight):
        return before.weight
    return WeightSquares(_squares(layer.base_values()), _written(weight))


def _written(weight: nn.Parameter) -> Hashable | None:
    """Return what is another value after a write to a weight, or None if torch does not count all writes.

    torch counts no step of a fused optimizer, and no write to an inference tensor.
    """
    part = local(weight)
    if weight.requires_grad or part.is_inference():
        return None
    # The weak reference keeps another storage from getting the same address. One to the weight itself would keep
    # torch.utils.swap_tensors from swapping it, as model.to() does with some kinds of tensors.
    storage = StorageWeakRef(part.untyped_storage())  # type: ignore[no-untyped-call]
    return id(weight), storage, part.data_ptr(), part._version


def _squares_of_gradient(factor: nn.Parameter, sync: RankSync) -> torch.Tensor:
    """Return this rank's share of the sum of squares of a gradient. Collective where the gradient is a partial sum."""
    gradient = factor.grad
    if gradient is None:
        return torch.zeros((), device=local(factor).device)
    if is_sharded(gradient):
        from ..distributed.tensor_parallel import sum_partials  # rarely needed, and takes long to import

        gradient = sum_partials(gradient)
    return _squares(local(gradient)) * sync.share(gradient)


def _squares(tensor: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return (norm if norm.device.type == "mps" else norm.double()).square()  # mps has no float64


def _sum(values: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = values
    return torch.stack([first, *(value.to(first.device) for value in others)]).sum()


def _stacks(layer: AdaptedWeights, stored: Mapping[str, torch.Tensor]) -> list[Stack]:
    return stack_blocks(layer.update_blocks(stored))


def _are_alike(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    pairs = [(first[leaf], second[leaf]) for leaf in first]
    return all(
        unsharded_shape(a) == unsharded_shape(b) and a.device == b.device and is_spread(a) == is_spread(b)
        for a, b in pairs
    )


def _to_cpu(measured: Iterable[_Measured]) -> None:
    """Move all tensors to the CPU, one transfer for each device, because each transfer waits for the device."""
    tensors = [t for m in measured for t in (*m.values.values(), *m.partial.values(), *_flat(m.grams))]
    moved: dict[int, torch.Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        values = torch.cat([tensor.flatten() for tensor in here]).cpu().double()
        parts = torch.split(values, [tensor.numel() for tensor in here])
        moved |= {id(tensor): part.view(tensor.shape) for tensor, part in zip(here, parts, strict=True)}
    for m in measured:
        m.values = {name: moved[id(value)] for name, value in m.values.items()}
        m.partial = {name: moved[id(value)] for name, value in m.partial.items()}
        m.grams = [(moved[id(left)], moved[id(right)]) for left, right in m.grams]


def _flat(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def _sum_over_ranks(measured: Iterable[_Measured], sync: RankSync) -> None:
    """Sum `partial` over the ranks, in one collective call."""
    totals = iter(sync.total(torch.stack([part for m in measured for part in m.partial.values()])).cpu())
    for m in measured:
        m.partial = {name: next(totals) for name in m.partial}


def _group_stats(measured: Mapping[str, _Measured], previous: Mapping[str, Snapshot]) -> GroupStats:
    layers = measured.values()
    updates = sum(float(m.values["squares"]) for m in layers)
    weights = sum(float(m.partial["W"]) for m in layers)
    roles = dict.fromkeys(role for m in layers for role in m.partial if role != "W" and role not in m.without_gradient)
    gradients = {role: math.sqrt(sum(float(m.partial[role]) for m in layers if role in m.partial)) for role in roles}
    ranks = _ranks([pair for m in layers for pair in m.grams])
    return GroupStats(
        layers=len(measured),
        norm=_norm(updates, weights),
        rank=float(ranks.mean()) if len(ranks) else None,
        gradients=gradients,
        cosine=_cosine(measured, previous),
    )


def _norm(updates: float, weights: float) -> float | None:
    """Return |D| / |W| from the two sums of squares; that of unknown weights is NaN."""
    if math.isnan(weights):
        return None
    return math.sqrt(updates / weights) if weights else math.nan


def _ranks(grams: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the effective rank of each product; products of one size are computed together."""
    sizes: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in grams:
        sizes.setdefault(pair[0].shape[-1], []).append(pair)
    of_size = [tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in sizes.values()]
    return torch.cat(
        [torch.empty(0), *(effective_rank(singular_values_of_grams(left, right)) for left, right in of_size)]
    )


def _cosine(measured: Mapping[str, _Measured], previous: Mapping[str, Snapshot]) -> float | None:
    compared = {name: m.values for name, m in measured.items() if "product" in m.values}
    product = sum(float(values["product"]) for values in compared.values())
    now = sum(float(values["squares"]) for values in compared.values())
    then = sum(previous[name].squares for name in compared)
    return product / (math.sqrt(now) * math.sqrt(then)) if now and then else None


def _snapshot(layer: AdaptedWeights, measured: _Measured) -> Snapshot:
    copies = {leaf: copy_of(tensor) for leaf, tensor in layer.stored().items()}
    return Snapshot(copies, float(measured.values["squares"]), measured.weight)
