"""initialize_from_data: let adapters start from training data, by their inputs (EVA) or their gradients (LoRA-GA)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, open_model
from ..model.merging import holds_merged
from ..model.recorded_layers import refuse_replaced_layers
from ..names import listed
from ..nn.adapted_weights import AdaptedWeights
from ..nn.low_rank import CONV1D, LINEAR
from ..nn.owner import claimed
from .batches import TAU, Caller, Forward, Mask, Run, call_with, learned_tokens
from .eva import start_from_inputs
from .lora_ga import start_from_gradients

log = logging.getLogger(__name__)


def initialize_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_with,
    *,
    mask: Mask = learned_tokens,
    tau: float = TAU,
) -> None:
    """Let the adapters of linear layers start from data, as init_lora_weights says. In place.

    With "lora_ga", A and B start from the gradients of the weights (arXiv:2407.05000). With any other value, A becomes
    the principal components of the layer's inputs and B stays zero (EVA, arXiv:2410.07170). The model's outputs do not
    change. The model runs in eval mode; its modes and the random stream are restored. Layers of other kinds keep their
    values, and a log line names them.

    Collective where torch.distributed is initialised: every rank calls this with batches of its own. All ranks get the
    first rank's components, or the mean of all ranks' gradients.

    Args:
        model: an injected model, before training.
        batches: what `forward` takes. Gradients use all of them; components use them until they have converged.
        forward: runs the model on one batch. For gradients it returns the loss, or an object with the loss as `loss`.
        mask: returns which tokens of a batch count, as bool (batch, tokens), or None for all. For components alone.
        tau: a component has converged when its cosine similarity to its value one batch earlier is at least this.

    Raises:
        LoRAError: the model was not injected, is merged or was trained already; there are no batches; a layer never
            ran; its inputs or gradients are not finite; or a weight gets no gradient. The model is then unchanged.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
        >>> initialize_from_data(model, [torch.randn(64, 8) for _ in range(50)])
    """
    handle = open_model(model, "initialize_from_data")
    start_from_batches(handle, Run(batches, forward, mask, tau, Caller()))
    handle.record.started = True


def start_from_batches(handle: AdaptedModel, run: Run) -> None:
    """Do what initialize_from_data does, for an opened model. In place."""
    layers = linear_layers(handle, run.caller.verb)
    with claimed("initialize_from_data", handle.record.owner):
        start = start_from_gradients if handle.record.config.has_start else start_from_inputs
        start(handle.model, layers, run)
    others = [name for name in handle.layers if name not in layers]
    if others:
        log.info("lightning_lora: %s start without data, for only linear layers can start from it", listed(others))


def linear_layers(handle: AdaptedModel, verb: str) -> dict[str, AdaptedWeights]:
    """Return the adapted linear layers by name; fused projections with parts are not among them.

    Raises:
        LoRAError: there is none, a layer was replaced, or the model is merged or trained. The message begins with the
            verb.
    """
    refuse_replaced_layers(handle, verb)
    layers = handle.layers
    if holds_merged(layers.values()):
        raise LoRAError(f"{verb}: the model is merged; call unmerge(model) first.")
    linear = {
        name: layer
        for name, layer in layers.items()
        if layer.kind() in (LINEAR, CONV1D) and layer.lora.spec.enabled is None
    }
    if not linear:
        raise LoRAError(
            f"{verb}: none of the {len(layers)} adapted layers is linear, and only linear layers can start from data."
        )
    trained = [name for name, layer in linear.items() if not layer.is_initial()]
    if trained:
        raise LoRAError(
            f"{verb}: B of {trained[0]!r} is not zero, so the adapter was trained or loaded; start from data first."
        )
    return linear
