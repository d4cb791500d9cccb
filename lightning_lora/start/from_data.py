"""initialize_from_data: let adapters start from training data, by their inputs (EVA) or their gradients (LoRA-GA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, open_model
from ..model.merging import holds_merged
from ..model.recorded_layers import refuse_replaced_layers
from ..names import listed
from ..nn.claims import claimed
from ..nn.low_rank import CONV1D, LINEAR
from ..notices import tell
from .batches import COUNT, Forward, Mask, call_with, learned_tokens
from .eva import start_from_inputs
from .lora_ga import start_from_gradients


def initialize_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_with,
    *,
    mask: Mask = learned_tokens,
    n: int = COUNT,
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
        batches: what `forward` takes.
        forward: runs the model on one batch. For gradients it returns the loss, or an object with the loss as `loss`.
        mask: returns which tokens of a batch count, as bool (batch, tokens), or None for all. For components alone.
        n: how many batches are used, the first ones.

    Raises:
        LoRAError: the model was not injected, is merged or was trained already; there are no batches; a layer never
            ran; its inputs or gradients are not finite; or a weight gets no gradient. The model is then unchanged.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
        >>> initialize_from_data(model, [torch.randn(64, 8) for _ in range(16)])
    """
    handle = open_model(model, "initialize_from_data")
    start_from_batches(handle, batches, forward, mask, n)
    handle.injection.marks.add("started")


def start_from_batches(handle: AdaptedModel, batches: Iterable[Any], forward: Forward, mask: Mask, n: int) -> None:
    """Do what initialize_from_data does, for an opened model. In place."""
    refuse_replaced_layers(handle, "initialize_from_data")
    if holds_merged(handle):
        raise LoRAError("initialize_from_data: the model is merged; call unmerge(model) first.")
    layers = {
        name: layer
        for name, layer in handle.layers.items()
        if layer.kind() in (LINEAR, CONV1D) and layer.lora.spec.enabled is None  # a fused projection has parts
    }
    others = [name for name in handle.layers if name not in layers]
    if not layers:
        raise LoRAError(
            f"initialize_from_data: none of the {len(others)} adapted layers is linear, and only linear layers can "
            "start from data."
        )
    trained = [name for name, layer in layers.items() if not layer.is_initial()]
    if trained:
        raise LoRAError(
            f"initialize_from_data: B of {trained[0]!r} is not zero, so the adapter was trained or loaded; start from "
            "data first."
        )
    with claimed("initialize_from_data", handle.injection.claims):
        if handle.injection.config.has_start:
            start_from_gradients(handle.model, layers, batches, forward, n)
        else:
            start_from_inputs(handle.model, layers, batches, forward, mask, n)
    if others:
        tell(f"lightning_lora: {listed(others)} start without data, for only linear layers can start from it")
