"""The layers that quantize_base quantised where an adapter was trained, and advice where they are plain in a model."""

from __future__ import annotations

from ..adapter.adapter import Adapter
from ..model.adapted_model import Listing
from ..names import listed
from ..nn.quantised import NF4, quantised_parameters


def plain_here(listing: Listing, adapter: Adapter) -> list[str]:
    """Return the layers that were torchao's NF4Tensor where an adapter was trained, and are plain in a model.

    Args:
        listing: of the model, adapted or not.
        adapter: under the model's names.
    """
    weights = [name for name, entry in adapter.fingerprint.items() if entry.get("quantised") == NF4]
    quantised = {name.removesuffix(".weight") for name in weights}
    return [name for name, module in listing.modules if name in quantised and not quantised_parameters(module)]


def remedy_for_plain(listing: Listing, adapter: Adapter) -> str:
    """Return the advice for an adapter of a quantised base in a model where that base is plain; "" elsewhere."""
    plain = plain_here(listing, adapter)
    if not plain:
        return ""
    return (
        f"Quantise the base as in training ({listed(plain)}) before it is adapted, by quantize_base with the options "
        'of that run or by LoRACallback(quantize="nf4"); load_from_checkpoint does it by itself.'
    )
