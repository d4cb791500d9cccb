"""Whether the layers that were adapted are still there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import LoRAError
from ..names import ATTRIBUTE, listed
from ..nn.adapted_module import records_of
from .adapted_model import AdaptedModel, Listing, moved_names
from .injection import Injection


def refuse_replaced_layers(listing: Listing, verb: str) -> None:
    """Raise LoRAError where an adapted layer was replaced by a layer without an adapter, or removed.

    Args:
        listing: of any module. A module without an injected model is accepted, and so is a part of one.
        verb: the beginning of the message.
    """
    layers = listing.all_layers.values()
    records, live = records_of(layers), {(layer.lora.injection, layer.lora.name) for layer in layers}
    if records and all((record, name) in live for record in records for name in record.layers):
        return
    for handle in _injected_models(listing, records):
        gone, expected = handle.gone()
        if gone:
            name, modules = handle.name_here(gone[0]), dict(handle.places)
            now = f"now a {describe_class(modules[name])}" if name in modules else "no longer there,"
            raise LoRAError(
                f"{verb}: {name!r} in {type(handle.model).__name__} was adapted, but is {now} without an adapter "
                f"({len(gone)} of {expected} adapted layers are gone). Replace or convert layers before they are "
                "adapted, in __init__, setup or configure_model, or leave them out with "
                f"exclude_modules=[{listed(list(map(repr, gone)))}]."
            )


def _injected_models(listing: Listing, records: Iterable[Injection]) -> Iterator[AdaptedModel]:
    """Yield the injected modules inside a model, else those that hold it, else the model itself, as new handles."""
    inside = [module for _, module in listing.modules if ATTRIBUTE in vars(module)]
    for module in inside:
        yield AdaptedModel(module, module, vars(module)[ATTRIBUTE])
    for record in () if inside else records:
        holder = record.holder()
        if holder is not None and any(module is listing.model for module in holder.modules()):
            yield AdaptedModel(holder, holder, record)
        else:
            yield AdaptedModel(listing.model, listing.model, record, moved=moved_names(listing, record))


def describe_class(module: nn.Module) -> str:
    """Return the class of a module with its module path."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
