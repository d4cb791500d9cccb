"""The updates of a model's adapter, live, merged or sharded, with the norms of the weights that they change."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from ..adapter.metadata import describe_model
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import gather_all, local, reshard_
from ..model.state_dict import adapter_state_dict
from ..model.wrappers import unwrapped
from ..names import names_factor
from ..nn.adapted_weights import AdaptedWeights, adapted_layers
from ..nn.quantised import dequantised
from .updates import Updates, measure, sum_of_squares


def updates_of_model(model: nn.Module) -> Updates:
    """Measure the adapter of an injected model, merged or not. Collective where the model is sharded.

    Factors that are not finite are measured too: their norms are NaN.

    Raises:
        LoRAError: the model was not injected, or rows of tables alone are trained.
    """
    model = unwrapped(model, "plot_adapter")
    tensors = {name: value for name, value in adapter_state_dict(model).items() if names_factor(name)}
    tensors = {name: value.cpu() for name, value in gather_all(tensors).items()}
    adapter = replace(describe_model(model), tensors=tensors)
    norms = _norms_in_model(model)
    whole = measure(type(model).__name__, adapter, norms)
    network = adapter.by_network_names()
    names = dict(zip(adapter.layers(), network.layers(), strict=True))
    return replace(whole, adapter=network, layers={names[name]: update for name, update in whole.layers.items()})


def _norms_in_model(model: nn.Module) -> dict[str, float]:
    """Return the norm of the weights that each adapter changes, as they are without it, by each of its names."""
    reshard_(model.modules())
    layers = adapted_layers(model, remove_duplicate=False)
    distinct = list(dict.fromkeys(layers.values()))
    sync = RankSync(layer.main_weight() for layer in distinct)
    squares = torch.tensor([_square_here(layer, sync) for layer in distinct], dtype=torch.float64)
    norms = dict(zip(distinct, sync.total(squares).sqrt().tolist(), strict=True))
    return {name: norms[layer] for name, layer in layers.items()}


def _square_here(layer: AdaptedWeights, sync: RankSync) -> float:
    """Return this rank's part of the squared norm of a layer's weights."""
    return math.fsum(
        sync.share(weight)
        * sum_of_squares(local(dequantised(layer.lora_holder, name) if layer.quantised() else layer.original(name)))
        for name, weight in layer.adapted_weights().items()
    )
