"""An adapter in the form that PEFT has for its variant, and back. The variant itself converts its tensors."""

from __future__ import annotations

from dataclasses import replace

from ..adapter.adapter import Adapter
from ..config import LoRAConfig
from ..nn.variant import Variant


def to_peft_form(adapter: Adapter) -> Adapter:
    """Return the adapter with tensors and options as PEFT has them for its variant, under our names."""
    if type(adapter.variant).to_peft is Variant.to_peft:
        return replace(adapter, config=config_in_peft(adapter))
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        stored = {leaf: value.detach() for leaf, value in adapter.stored(layer).items()}
        changed = adapter.variant.to_peft(stored, adapter.layer_info(layer))
        for leaf in stored.keys() - changed.keys():
            del tensors[adapter.factor_name(layer, leaf)]
        tensors |= {adapter.factor_name(layer, leaf): value for leaf, value in changed.items()}
    return replace(adapter, tensors=tensors, config=config_in_peft(adapter)).with_layers()


def from_peft_form(adapter: Adapter) -> Adapter:
    """Undo to_peft_form, for an adapter whose options are ours.

    Raises:
        LoRAError: the tensors of a layer do not have that form.
    """
    if type(adapter.variant).from_peft is Variant.from_peft:
        return adapter
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        found = adapter.stored(layer)
        if not found.keys() >= set(adapter.variant.trained):
            continue  # the check of factors refuses it
        changed = adapter.variant.from_peft(found, adapter.layer_info(layer))
        tensors |= {adapter.factor_name(layer, leaf): value for leaf, value in changed.items()}
    return replace(adapter, tensors=tensors).with_layers()


def config_in_peft(adapter: Adapter) -> LoRAConfig | None:
    """Return the options that an adapter has in PEFT's form."""
    return None if adapter.config is None else adapter.variant.config_in_peft(adapter.config)
