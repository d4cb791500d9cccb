"""Which layers were adapted, as the record and the modules keep it, and whether they are still there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from torch import nn

from ..errors import LoRAError
from ..names import ATTRIBUTE, listed
from ..nn.adapted_weights import AdaptedWeights, adapted_places
from .adapted_model import AdaptedModel, Listing, is_inside
from .rebuilt_modules import note_owners


def record_layers(handle: AdaptedModel) -> None:
    """Record which layers are adapted now, in the record and in each module that holds such layers. In place."""
    record, by_name = handle.record, defaultdict[str, list[nn.Module]](list)
    for name, module in handle.root_modules:
        by_name[name].append(module)
        kept = record.kept(module)
        if kept is not None:
            kept.pop("layers", None)
    record.layers = []
    for name, _, _ in adapted_places(handle.root, modules=handle.root_modules):
        record.layers.append(name)
        segments = name.split(".") if name else []
        for depth in range(len(segments)):
            inner = ".".join(segments[depth:])
            for module in by_name.get(".".join(segments[:depth]), ()):
                record.keep(module).setdefault("layers", {})[inner] = name
    note_owners(handle)


def refuse_replaced_layers(listing: Listing, verb: str) -> None:
    """Raise LoRAError where an adapted layer was replaced by a layer without an adapter, or removed.

    Args:
        listing: of any module. A module without an injected model is accepted.
        verb: the beginning of the message.
    """
    if listing.layers and _are_complete(listing.layers.values()):
        return
    for root in _injected_modules(listing):
        expected, gone = _gone_layers(root)
        if gone:
            modules = dict(root.modules)
            now = f"now a {describe_class(modules[gone[0]])}" if gone[0] in modules else "no longer there,"
            raise LoRAError(
                f"{verb}: {gone[0]!r} in {type(root.model).__name__} was adapted, but is {now} without an adapter "
                f"({len(gone)} of {expected} adapted layers are gone). Replace or convert layers before they are "
                "adapted, in __init__, setup or configure_model, or leave them out with "
                f"exclude_modules=[{listed(list(map(repr, gone)))}]."
            )


def _are_complete(layers: Collection[AdaptedWeights]) -> bool:
    """Return whether these are all layers of each injection that one of them belongs to."""
    live = {(id(layer.lora.injection), layer.lora.name) for layer in layers}
    records = {id(layer.lora.injection): layer.lora.injection for layer in layers}
    return all((number, name) in live for number, record in records.items() for name in record.layers)


def _injected_modules(listing: Listing) -> list[Listing]:
    """Return the injected modules inside a model, else the injected modules that hold it, else the model itself."""
    inside = [module for _, module in listing.modules if ATTRIBUTE in vars(module)]
    records = {id(layer.lora.injection): layer.lora.injection for layer in listing.layers.values()}
    holders = {id(holder): holder for holder in (record.holder() for record in records.values()) if holder is not None}
    outer = [] if inside else [Listing(holder) for holder in holders.values()]
    outer = [each for each in outer if any(module is listing.model for _, module in each.modules)]
    return outer or [listing if module is listing.model else Listing(module) for module in inside or [listing.model]]


def _gone_layers(root: Listing) -> tuple[int, list[str]]:
    """Return how many layers were adapted in an injected module, and the names of those that are gone."""
    records = [
        *filter(None, [vars(root.model).get(ATTRIBUTE)]),
        *(each.lora.injection for each in root.layers.values()),
    ]
    adapted = {name for name, _, _ in adapted_places(root.model, modules=root.modules)}
    live = {layer.lora.name for layer in root.layers.values()}  # a moved layer has another name now
    expected: dict[str, str] = {}
    outermost: str | None = None
    for name, module in root.modules if records else ():
        kept = records[0].kept(module)
        layers = kept.get("layers") if kept is not None else None
        if layers and (outermost is None or not is_inside(name, outermost)):
            outermost = name
            expected |= {f"{name}.{inner}" if name else inner: recorded for inner, recorded in layers.items()}
    gone = [name for name, recorded in expected.items() if name not in adapted and recorded not in live]
    return len(expected), gone


def describe_class(module: nn.Module) -> str:
    """Return the class of a module with its module path."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
