"""Whether the layers that were adapted are still there."""

from __future__ import annotations

from ..errors import LoRAError
from ..names import join_names, listed
from .adapted_model import Listing, injection_of_root, is_inside
from .facts import facts_of, lost_children


def refuse_replaced_layers(listing: Listing, verb: str) -> None:
    """Raise LoRAError where an adapted layer was replaced by a layer without an adapter, or removed.

    Each module knows which of its children held adapted layers, so that blocks may be wrapped, and put into new
    containers in any order and number.

    Args:
        listing: of any module. A module without an injected model is accepted, and so is a part of one.
        verb: the beginning of the message.
    """
    roots = (place for place in listing.modules if injection_of_root(place[1]) is not None)
    outer, root = next(roots, ("", listing.model))  # names are those that the options count for
    inside = ((path, module) for path, module in listing.modules if is_inside(path, outer))
    gone = {
        join_names(path[len(outer) :].removeprefix("."), child): module
        for path, module in inside
        for child in lost_children(module)
    }
    gone = {name: module for name, module in gone.items() if not any(other.startswith(f"{name}.") for other in gone)}
    if not gone:
        return
    layers = next(facts.injection.layers for module in gone.values() if (facts := facts_of(module)) is not None)
    names = sorted(gone, key=lambda name: next((i for i, layer in enumerate(layers) if is_inside(layer, name)), 0))
    present = gone[names[0]]._modules.get(names[0].rpartition(".")[2])
    class_now = f"{type(present).__module__}.{type(present).__qualname__}"
    now = f"now a {class_now}" if present is not None else "no longer there,"
    raise LoRAError(
        f"{verb}: {names[0]!r} in {type(root).__name__} was adapted, but is {now} without an adapter "
        f"({len(gone)} of {len(layers)} adapted layers are gone). Replace or convert layers before they are adapted, "
        "in __init__, setup or configure_model, or leave them out with "
        f"exclude_modules=[{listed(list(map(repr, names)))}]."
    )
