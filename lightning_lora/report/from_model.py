"""Measure the updates of a model's adapter, and the norms of the weights that they change."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..adapter.renaming import by_network_names
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import gather_all, local, reshard_
from ..exchange.take import describe
from ..model.adapted_model import AdaptedModel, open_model
from ..model.live_state import LiveState
from ..names import names_factor
from ..nn.adapted_weights import AdaptedWeights
from ..nn.quantised import dequantize
from .updates import Updates, measure, sum_of_squares


def updates_of_model(model: nn.Module) -> Updates:
    """Measure the adapter of an injected model, merged or not. Collective where the model is sharded.

    The norm of factors that are not finite is NaN.

    Raises:
        LoRAError: the model was not injected, or rows of tables alone are trained.
    """
    live = LiveState(open_model(model, "plot_adapter"))
    description = describe(live, "plot_adapter")
    tensors = {name: value.cpu() for name, value in gather_all(_adapters_own(live)).items()}
    adapter = replace(description, tensors=tensors)
    whole = measure(type(live.handle.model).__name__, adapter, _norms_in_model(live.handle))
    network = by_network_names(adapter)
    names = dict(zip(adapter.layers, network.layers, strict=True))
    return replace(whole, adapter=network, layers={names[name]: update for name, update in whole.layers.items()})


def _adapters_own(live: LiveState) -> dict[str, torch.Tensor]:
    """Return the adapter's own tensors by name, without trained tensors of the base."""
    return {name: value for name, value in live.values().items() if names_factor(name)}


def _norms_in_model(handle: AdaptedModel) -> dict[str, float]:
    """Return the Frobenius norm of W for each adapter, by each of the adapter's names."""
    reshard_(module for _, module in handle.modules)
    layers = handle.layers_by_every_name
    distinct = list(dict.fromkeys(layers.values()))
    sync = RankSync(layer.adapted_weight() for layer in distinct)
    squares = torch.tensor([_square_here(layer, sync) for layer in distinct], dtype=torch.float64)
    norms = dict(zip(distinct, sync.total(squares).sqrt().tolist(), strict=True))
    return {name: norms[layer] for name, layer in layers.items()}


def _square_here(layer: AdaptedWeights, sync: RankSync) -> float:
    """Return this rank's share of the squared norm of a layer's weight."""
    values = dequantize(layer.lora_holder) if layer.quantised() else layer.original()
    return sync.share(layer.adapted_weight()) * sum_of_squares(local(values))
