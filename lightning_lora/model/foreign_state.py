"""The foreign entries of a live model's state dict: found without asking the whole model, and handed back to it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..distributed.flat import owns_flat
from ..errors import LoRAError, sentence
from ..names import CHECKPOINTED, canonical, parent_names
from ..nn.adapted_module import AdaptedModule
from ..nn.foreign_entries import METADATA, ForeignEntries, foreign_of, metadata_of, with_metadata
from ..nn.foreign_linear import is_of_base
from ..nn.quantized import quantization_entries, unchanged_weight
from .adapted_model import AdaptedModel, Listing, is_inside
from .dequantize import quantized_weights
from .live_state import LiveState

WRITERS = ("state_dict", "_save_to_state_dict")  # nn.Module's methods by which a module writes its entries


def foreign_names(listing: Listing, state: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the names in a state dict that are no parameter's, buffer's or extra state's.

    Args:
        listing: of the model.
        state: its state dict. Entries that describe quantized weights are left out.
        known: the names of listing.state().
    """
    names = {name: canonical(name) for name in state}
    unknown = [name for name, plain in names.items() if plain not in known and not plain.startswith(listing.copies)]
    if not unknown:
        return []
    described = quantization_entries(map(canonical, unknown), quantized_weights(listing.places))
    return [name for name in unknown if names[name] not in described]


def foreign_entries(listing: Listing) -> ForeignEntries:
    """Return what modules write into a model's state dict of their own.

    Only the outermost modules that write in a way of their own are asked. A module with flat weights inside is not,
    because it would gather them.
    """
    state = _written(listing)
    if not state:
        return ForeignEntries()
    known = {name for name, _, _ in listing.state()}
    return foreign_of(state, foreign_names(listing, state, known))


def without_base(listing: Listing, foreign: ForeignEntries) -> ForeignEntries:
    """Return foreign entries without those of foreign linear layers, which are the base's weights, as HQQLinear's."""
    if not foreign.values:
        return foreign
    base = tuple(f"{name}." for name, module in listing.places if is_of_base(module))
    return foreign.with_names(lambda name: None if name.startswith(base) else name)


def _written(listing: Listing) -> dict[str, Any]:
    """Return the state dict of all modules that write in a way of their own."""
    state: dict[str, Any] = OrderedDict()
    setattr(state, METADATA, OrderedDict())
    plain: dict[type, bool] = {}
    asked: list[str] = []
    flat = [name for name, module in listing.places if owns_flat(module)]
    for name, module in listing.places:  # a module comes before those in it
        cls = type(module)
        if cls not in plain:
            classes = [each for each in cls.__mro__ if each is not AdaptedModule]  # of the class that was adapted
            defining = [next(each for each in classes if method in vars(each)) for method in WRITERS]
            plain[cls] = all(each is nn.Module for each in defining)
        if plain[cls] and not module._state_dict_hooks and "state_dict" not in vars(module):
            continue
        if (asked and is_inside(name, asked[-1])) or any(is_inside(each, name) for each in flat):
            continue
        asked.append(name)
        if not name:  # as a user calls it
            return module.state_dict()
        module.state_dict(destination=state, prefix=f"{name}.", keep_vars=False)  # as the module around it does
    return state


def unchanged_state(handle: AdaptedModel) -> dict[str, Any]:
    """Return the model's state dict with its metadata; loading it leaves quantized weights untouched.

    It is empty where weights are flat. A strategy with flat weights loads what a checkpoint holds, and state_dict would
    gather the whole model.
    """
    if any(owns_flat(module) for _, module in handle.modules):
        return {}
    whole = handle.model.state_dict()
    state, quantized = {canonical(name): value for name, value in whole.items()}, quantized_weights(handle.places)
    for name in quantization_entries(state, quantized):
        del state[name]
    for name, owner in quantized.items():
        state[name] = unchanged_weight(owner, owner._parameters[name.rpartition(".")[2]])
    return with_metadata(state, metadata_of(whole))


def with_foreign(live: LiveState, state: Mapping[str, Any], foreign: ForeignEntries) -> dict[str, Any]:
    """Return a state dict with foreign entries for load_state_dict, which hands them to the modules that wrote them.

    Args:
        live: the model that loads them.
        state: without wrappers' segments, with the model's own metadata. Foreign entries in it are replaced.
        foreign: without wrappers' segments.
    """
    modules = [name for name, _ in live.handle.model.named_modules(remove_duplicate=False)]
    inner = {canonical(name): name for name in modules}  # of a wrapper and the module inside, the module
    entries = {}
    for given, value in {**state, **foreign.values}.items():
        name = canonical(given)
        owner = next((module for module in reversed(parent_names(name)) if module in inner), "")
        full = inner[owner] + name[len(owner) :] if owner else name
        entries[full.replace(f"{CHECKPOINTED}.", "")] = value  # checkpoint_wrapper adds its segment itself
    versions = {name: foreign.versions[canonical(name)] for name in modules if canonical(name) in foreign.versions}
    return with_metadata(entries, metadata_of(state) | versions)


def load_foreign_(live: LiveState, foreign: ForeignEntries) -> None:
    """Hand foreign entries to the modules that wrote them, by load_state_dict of the whole model. In place.

    Where weights are flat, it is called on the outermost modules without such weights. Entries of others are passed
    over, as they are where a checkpoint is saved.

    Raises:
        LoRAError: no module takes one of them.
    """
    if not foreign.values:
        return
    model, given = live.handle.model, copy.deepcopy(foreign)  # a module may keep what it is given
    state = unchanged_state(live.handle)
    try:
        if state:
            model.load_state_dict(with_foreign(live, state, given))
        else:
            _load_beside_flat_(live.handle, given)
    except RuntimeError as error:
        first = next(iter(foreign.values))
        raise LoRAError(
            f"adapter: {type(model).__name__} does not take what a module wrote into state_dict() where the adapter "
            f"was saved, such as {first!r}: {sentence(error)} Load it into a model of the same modules."
        ) from error


def _load_beside_flat_(listing: Listing, foreign: ForeignEntries) -> None:
    flat, done = [name for name, module in listing.places if owns_flat(module)], ""
    for name, module in listing.places:
        if not name or (done and is_inside(name, done)) or any(is_inside(each, name) for each in flat):
            continue
        done = name
        inside = foreign.with_names(partial(_name_inside, f"{name}."))
        if inside.values:
            state = module.state_dict()
            versions = {**metadata_of(state), **inside.versions}
            module.load_state_dict(with_metadata({**state, **inside.values}, versions))


def _name_inside(prefix: str, name: str) -> str | None:
    return name.removeprefix(prefix) if name.startswith(prefix) else None
