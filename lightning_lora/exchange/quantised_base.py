"""The base of an adapter that was trained on quantize_base's layers: made so again, or told how to make it.

The adapter's fingerprint says layer by layer how the base was quantised.
"""

from __future__ import annotations

from collections.abc import Set

from ..adapter.adapter import Adapter
from ..config import LoRAConfig
from ..model.adapted_model import AdaptedModel, Listing
from ..model.quantise import call_that_quantises, quantise_named_
from ..nn.quantised import NF4, quantised_parameters
from .align import align_names
from .first_names import Names, by_first_names


def quantise_as_trained_(listing: Listing, adapter: Adapter) -> str:
    """Quantise the layers of a new model that quantize_base had quantised where an adapter was trained. In place.

    Args:
        listing: of the model. Layers that are quantised or adapted already stay as they are.
        adapter: under any prefix.

    Returns:
        The call that does the same, or "" where there is nothing to quantise, or no such call.

    Raises:
        LoRAError: torchao is missing, or a weight cannot be quantised.
    """
    if not _quantised_in_training(adapter):
        return ""
    names = Names(listing.places)
    adapter = by_first_names(names, align_names(listing, names, adapter))
    plain, call = _plain_here(listing, adapter), _call(listing, adapter)
    quantise_named_(listing, plain)
    return call


def remedy_for_load(listing: Listing, adapter: Adapter) -> str:
    """Return the advice for load_adapter where quantize_base has to come first; "" where it has not."""
    call = _call(listing, adapter)
    if not call:
        return ""
    steps = ["unload(model)", call] if isinstance(listing, AdaptedModel) else [call]
    return (
        f"To quantise it as there, call {', then '.join(steps)}, and then load_adapter again. strict_base=False makes "
        "this a warning."
    )


def remedy_for_trainer(listing: Listing, adapter: Adapter) -> str:
    """Return the advice for a Trainer's ckpt_path where the base has to be quantised; "" where it has not."""
    call = _call(listing, adapter)
    if not call:
        return ""
    return (
        f"To quantise it as there, call {call} on the new model before the Trainer gets it, or give LoRACallback "
        'quantize="nf4" beside the options of the first run.'
    )


def _call(listing: Listing, adapter: Adapter) -> str:
    plain = _plain_here(listing, adapter)
    return call_that_quantises(listing, plain, adapter.config or LoRAConfig()) if plain else ""


def _quantised_in_training(adapter: Adapter) -> Set[str]:
    weights = [name for name, entry in adapter.fingerprint.items() if entry.get("quantised") == NF4]
    return {name.removesuffix(".weight") for name in weights}


def _plain_here(listing: Listing, adapter: Adapter) -> Set[str]:
    """Return the layers that were quantised where the adapter was trained, and are plain in this model."""
    quantised = _quantised_in_training(adapter)
    if not quantised:
        return set()
    return {name for name, module in listing.modules if name in quantised and not quantised_parameters(module)}
