"""The layers that quantize_base quantised where an adapter was trained, and advice where they are plain in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..adapter.adapter import Adapter
from ..config import LoRAConfig
from ..model.adapted_model import AdaptedModel, Listing
from ..nn.quantised import NF4, quantised_parameters

# model.quantise.call_that_quantises, which stands above some of those who ask here
CallFor = Callable[[Listing, Collection[str], LoRAConfig], str]


def quantised_in_training(adapter: Adapter) -> set[str]:
    """Return the layers whose weights were torchao's NF4Tensor where an adapter was trained."""
    weights = [name for name, entry in adapter.fingerprint.items() if entry.get("quantised") == NF4]
    return {name.removesuffix(".weight") for name in weights}


def unquantised(listing: Listing, adapter: Adapter) -> set[str]:
    """Return the layers that were quantised where an adapter was trained, and are not in a model.

    Args:
        listing: of the model, adapted or not.
        adapter: under the model's names.
    """
    quantised = quantised_in_training(adapter)
    if not quantised:
        return set()
    return {name for name, module in listing.modules if name in quantised and not quantised_parameters(module)}


def missing_call(listing: Listing, adapter: Adapter, call_for: CallFor) -> str:
    """Return the call that quantises these layers, or "" where nothing is, or no call does."""
    names = unquantised(listing, adapter)
    return call_for(listing, names, adapter.config or LoRAConfig()) if names else ""


def remedy_for_load(listing: Listing, adapter: Adapter, call_for: CallFor) -> str:
    """Return the advice for load_adapter where quantize_base has to come first; "" where it has not."""
    call = missing_call(listing, adapter, call_for)
    if not call:
        return ""
    steps = f"unload(model), then {call}" if isinstance(listing, AdaptedModel) else call
    return (
        f"To quantise it as there, call {steps}, and then load_adapter again. strict_base=False makes this a warning."
    )


def remedy_for_trainer(listing: Listing, adapter: Adapter, call_for: CallFor) -> str:
    """Return the advice for a Trainer's ckpt_path where the base has to be quantised; "" where it has not."""
    call = missing_call(listing, adapter, call_for)
    if not call:
        return ""
    return (
        f"To quantise it as there, call {call} on the new model before the Trainer gets it, or give LoRACallback "
        'quantize="nf4".'
    )
