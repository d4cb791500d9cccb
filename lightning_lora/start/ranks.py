"""redistribute_ranks: give each layer a rank by the variance that its inputs' components explain (arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..matching import exact_key
from ..model.adapted_model import open_model
from ..names import listed
from ..nn.adapted_weights import AdaptedWeights
from .batches import TAU, Caller, Forward, Mask, Run, call_with, from_first_rank, learned_tokens
from .eva import PrincipalComponents, principal_components
from .from_data import linear_layers

Number = TypeVar("Number", int, float)


def redistribute_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_with,
    *,
    mask: Mask = learned_tokens,
    rho: float = 2.0,
    tau: float = TAU,
    adjust_alpha: bool = True,
) -> LoRAConfig:
    """Return options with other ranks: a layer whose inputs' components explain more variance gets a higher rank.

    The sum of the ranks stays the same (arXiv:2410.07170). The model is not changed: unload it and inject the options,
    or give them to LoRACallback. Collective, as initialize_from_data.

    Args:
        model: an injected model, before training.
        batches: what `forward` takes. They are used until the components have converged.
        forward: runs the model on one batch.
        mask: returns which tokens of a batch count, as bool (batch, tokens), or None for all.
        tau: a component has converged when its cosine similarity to its value one batch earlier is at least this.
        rho: a layer's new rank is at most its r times this number, which is at least 1.
        adjust_alpha: keep each layer's s, by another lora_alpha.

    Returns:
        The model's options with rank_pattern and alpha_pattern. Layers that get no rank are in exclude_modules.

    Raises:
        LoRAError: as initialize_from_data, or rho is less than 1.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
        >>> config = redistribute_ranks(model, [torch.randn(64, 8) for _ in range(50)])
        >>> sum(config.rank(name) for name in names)
        4
    """
    if not rho >= 1:
        raise LoRAError(f"redistribute_ranks: rho must be a number of at least 1, but it is {rho!r}.")
    handle = open_model(model, "redistribute_ranks")
    layers = linear_layers(handle, "redistribute_ranks")
    ranks = {name: layer.lora.spec.r for name, layer in layers.items()}
    sizes = {name: min(round(rho * r), layers[name].lora_A.shape[1]) for name, r in ranks.items()}
    budget = sum(ranks.values())
    run = Run(batches, forward, mask, tau, Caller("redistribute_ranks"))
    found = principal_components(handle.model, layers, run, sizes, lambda components: _divide(budget, components))
    explained = {name: from_first_rank(each.explained) for name, each in found.items()}
    return _with_ranks(handle.record.config, layers, _divide(budget, found, explained), adjust_alpha)


def _divide(
    budget: int, found: Mapping[str, PrincipalComponents], explained: Mapping[str, torch.Tensor] | None = None
) -> dict[str, int]:
    """Return the rank of each layer: the budget goes to the components that explain most, wherever they are.

    Of layers with equal shares the first one gets more.

    Args:
        budget: the sum of all ranks.
        found: the components of each layer.
        explained: shares of the variance by layer, such as the first rank's; by default the shares in `found`.
    """
    shares = explained or {name: each.explained for name, each in found.items()}
    order = [(name, share) for name, values in shares.items() for share in values.tolist()]
    ranks = dict.fromkeys(found, 0)
    for name, _ in sorted(order, key=lambda entry: -entry[1])[:budget]:
        ranks[name] += 1
    return ranks


def _with_ranks(
    config: LoRAConfig, layers: Mapping[str, AdaptedWeights], ranks: Mapping[str, int], adjust_alpha: bool
) -> LoRAConfig:
    """Return the options with these ranks of layers in rank_pattern and alpha_pattern.

    Raises:
        LoRAError: a layer gets no rank, and exclude_modules is a regular expression.
    """
    rank_pattern, alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    new_ranks = {exact_key(name): r for name, r in ranks.items() if r and r != layers[name].lora.spec.r}
    new_alphas = {
        exact_key(name): layers[name].lora.spec.alpha
        * (r / layers[name].lora.spec.r) ** (0.5 if config.use_rslora else 1)
        for name, r in ranks.items()
        if r and r != layers[name].lora.spec.r
    }
    idle = [name for name, r in ranks.items() if not r]
    excluded = config.exclude_modules
    if idle and isinstance(excluded, str):
        raise LoRAError(
            f"redistribute_ranks: {listed(idle)} get no rank and would be added to exclude_modules, but "
            f"exclude_modules={excluded!r} is a regular expression; give a list of names."
        )
    return replace(
        config,
        rank_pattern=_put_before(new_ranks, rank_pattern) or None,
        alpha_pattern=_put_before(new_alphas if adjust_alpha else {}, alpha_pattern) or None,
        exclude_modules=[*(excluded or ()), *idle] or None,
    )


def _put_before(new: Mapping[str, Number], earlier: Mapping[str, Number]) -> dict[str, Number]:
    """Return one pattern of two, the new keys first: the first key that matches a layer counts."""
    return {**new, **{key: value for key, value in earlier.items() if key not in new}}
