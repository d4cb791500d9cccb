"""What the metadata of a state dict says, and a look at what load_state_dict loads into an injected model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..names import INJECTION_ATTRIBUTE, canonical, listed, parent_names
from ..nn.adapted_module import MERGED, AdaptedModule, NamedModules, adapted_layers, adapters_by_path
from ..nn.attached_factors import LACKING
from ..nn.foreign_entries import with_metadata
from .adapted_model import Listing, find_adapted
from .initial_values import record_loaded


def mark_merged(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of merged weights whose metadata says so: a layer with an adapter refuses to load it.

    Each module's metadata says it, because torch shows a module its own alone: the layer may lie under a parent that
    knows nothing of adapters.
    """
    modules = {"", *metadata, *(name.rpartition(".")[0] for name in state)}
    entries = {name: {key: v for key, v in metadata.get(name, {}).items() if key != LACKING} for name in modules}
    return with_metadata(state, {name: {**entry, MERGED: True} for name, entry in entries.items()})


def hook_load_state_dict(places: NamedModules) -> None:
    """Let an injected model, and each module with adapters in it, look at what load_state_dict loads. In place.

    Args:
        places: every module of the model, under each of its names.
    """
    names = {name for name, module in places if isinstance(module, AdaptedModule)}
    names |= {outer for name in names for outer in ("", *parent_names(name))}
    for name, module in places:
        if name in names and not _hooks(module):
            module.register_load_state_dict_pre_hook(_check_load)  # type: ignore[no-untyped-call]


def unhook_load_state_dict(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of hook_load_state_dict out of these modules. In place."""
    for module in modules:
        for key in _hooks(module):
            del module._load_state_dict_pre_hooks[key]


def _hooks(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check_load]


def _check_load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    *args: Any,
) -> None:
    """Look at a state dict before it is loaded into the injected model or a part of it (a hook of torch).

    It acts in the module that load_state_dict was called on, and in the injected module. A complete base without an
    adapter is recorded as the one from before training. Adapters without an entry beside others that have some are
    missing; without any, each adapter keeps its tensors.

    Raises:
        LoRAError: the state dict says that adapters were attached which are not here.
    """
    attached = {name for layer in adapted_layers(module).values() for name in layer.attached()}
    if names := sorted(set(metadata.get(LACKING, ())) - attached):
        raise LoRAError(
            f"load_state_dict: the state dict is of a model with attached adapters, which no state dict holds, and "
            f"{listed(list(map(repr, names)))} {'is' if len(names) == 1 else 'are'} not attached here. Call "
            f"attach(model, source, name={names[0]!r}) first; dict(state_dict) does not say it, and is loaded without."
        )
    if INJECTION_ATTRIBUTE not in vars(module) and canonical(prefix.rstrip(".")):
        return
    listing = Listing(module)
    kept = {id(tensor) for layer in listing.layers.values() for tensor in layer.stored().values()}
    given = {canonical(key.removeprefix(prefix)): v for key, v in state_dict.items() if id(v) not in kept}
    factors = [(each, path + name) for path, each in adapters_by_path(listing.places) for name in each.stored_names()]
    loaded = {adapter for adapter, name in factors if name in given}
    if loaded:
        missing += [prefix + name for adapter, name in factors if adapter not in loaded]
    elif listing.layers:  # else it may be a trained head: nothing tells that from a base
        base = listing.base_keys()
        handle = find_adapted(listing, part=True)
        if handle is not None and given.keys() >= set(base):
            record_loaded(handle, {name: given[name] for name in base})
