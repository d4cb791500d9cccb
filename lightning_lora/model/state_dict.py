"""State dicts of an injected model: views for saving, and a look at what load_state_dict loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..distributed.flat import gather_flat, owns_flat
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import is_spread
from ..errors import LoRAError
from ..names import ATTRIBUTE, canonical, parent_names
from ..nn.adapted_module import AdaptedModule, is_factor
from ..nn.adapted_weights import (
    AdaptedWeights,
    Blocks,
    NamedModules,
    adapters_in,
    layer_adapter,
)
from ..nn.foreign_entries import metadata_of, with_metadata
from ..nn.owner import claimed
from ..nn.quantised_state import quantisation_entries
from ..nn.rounding import ONCE, Rounding
from ..nn.tied_weights import record_ties
from ..progress import progress_bar
from .adapted_model import AdaptedModel, Listing, find_model, open_model
from .dequantize import DEQUANTISED, IN_FLOAT32, dequantize_dtype, plain_weight, quantised_weights
from .foreign_state import foreign_entries, foreign_names, without_base
from .gradients import warn_of_untrained
from .initial_values import record_loaded
from .live_state import open_state, original_values
from .recorded_layers import refuse_replaced_layers

# Key in the metadata of a state dict, which torch pickles with the dictionary and hands to load_state_dict's hooks.
_MERGED = "lora_merged"


def base_keys(listing: Listing) -> list[str]:
    """Return the names of the plain model's state dict."""
    return [name for name, _, module in listing.state() if not is_factor(name, module)]


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return all that training can change, by the names of the state dict: detached tensors in the model's memory.

    What modules write into state_dict() of their own, as persistent metrics do, is in it as they write it. load_adapter
    takes the result, and so does load_state_dict with strict=False.

    Collective where DeepSpeed's stage 3 or FSDP1 divides the model: its tensors are gathered.

    Raises:
        LoRAError: the model was not injected, or a layer was replaced since.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> {name: tuple(value.shape) for name, value in adapter_state_dict(model).items()}
        {'0.lora_A': (2, 8), '0.lora_B': (8, 2), '2.lora_A': (2, 8), '2.lora_B': (2, 2)}
    """
    handle = open_model(model, "adapter_state_dict")
    with claimed("adapter_state_dict", handle.record.owner):
        refuse_replaced_layers(handle, "adapter_state_dict")
        warn_of_untrained(handle)
        state, foreign = gather_flat(open_state(handle).values()), without_base(handle, foreign_entries(handle))
    return with_metadata(state | dict(foreign.values), foreign.versions) if foreign.values else state


def merged_state_dict(model: nn.Module, *, dequantize: torch.dtype | str | None = None) -> dict[str, Any]:
    """Return the state dict of the plain model with merged weights. The model is not changed, and may be merged.

    Collective where the model is sharded. Where DeepSpeed's stage 3 or FSDP1 divides it, every rank gets all of it;
    save_merged takes less memory.

    Args:
        model: an injected model.
        dequantize: the dtype of plain weights in place of quantised weights, adapted or not.

    Raises:
        LoRAError: the model was not injected, a layer was replaced since, or an adapter cannot be expressed by a merged
            weight, such as that of a quantised weight without `dequantize`.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plain.load_state_dict(merged_state_dict(model))
        <All keys matched successfully>
        >>> torch.allclose(plain(x := torch.ones(1, 8)), model(x), atol=1e-5)
        True
    """
    dtype = dequantize_dtype(dequantize, "merged_state_dict")
    handle = open_model(model, "merged_state_dict")
    with claimed("merged_state_dict", handle.record.owner):
        refuse_replaced_layers(handle, "merged_state_dict")
        warn_of_untrained(handle)
        whole = _state_to_merge(handle)
        return mark_merged(gather_flat(merge_state_dict(handle, whole, dtype)), metadata_of(whole))


def _state_to_merge(handle: AdaptedModel) -> dict[str, Any]:
    """Return what state_dict() does, with slices of flat weights. FSDP1 would gather all weights for state_dict()."""
    entries = handle.state()
    if any(owns_flat(module) for _, module in handle.modules):
        return original_values(entries)
    spread = original_values(entry for entry in entries if is_spread(entry[1]))  # state_dict() shows no flat values
    state = handle.model.state_dict()
    metadata = {canonical(name): version for name, version in metadata_of(state).items()}
    return with_metadata({canonical(name): value for name, value in state.items()} | spread, metadata)


def mark_merged(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of merged weights whose metadata says so: a model with an adapter refuses to load it."""
    return with_metadata(state, {**metadata, "": {**metadata.get("", {}), _MERGED: True}})


def merge_state_dict(
    listing: Listing, state: Mapping[str, Any], dtype: torch.dtype | None = None, tells: str = ONCE
) -> dict[str, Any]:
    """Return a state dict of the plain model: each adapter is merged into a copy of its weight and left out.

    Args:
        listing: of the model. It says which names belong to adapted layers; live values are used of quantised weights
            alone.
        state: the full state dict, under names without the segments of wrappers. Its values may differ from the
            model's.
        dtype: of plain weights in place of quantised weights, or None where these stay.
        tells: when to tell what rounding these costs, see Rounding.

    Raises:
        LoRAError: an adapter cannot be merged, or `state` leaves out one of its tensors or its weight.
        NonFiniteError: a merged weight is not finite, on any rank.
    """
    refuse_unmergeable(listing, dtype)
    quantised = {name: module for name, module in quantised_weights(listing.places).items() if name in state}
    owners = {name: module for name, _, module in listing.state()}
    plain = {name: state[name] for name, module in owners.items() if name in state and not is_factor(name, module)}
    plain |= {name: state[name] for name in foreign_names(listing, state, owners)}
    sync = RankSync(value for value in state.values() if isinstance(value, torch.Tensor))
    if dtype is None:
        plain |= {name: state[name] for name in quantisation_entries(state, quantised)}
    else:
        plain |= _dequantize_state(quantised, state, dtype, Rounding(sync, tells))

    copies: dict[AdaptedWeights, torch.Tensor] = {}

    def merge_layer(name: str, layer: AdaptedWeights, blocks: Blocks) -> None:
        if layer not in copies:  # a shared layer is merged once
            copies[layer] = layer.merged_copy(state[name], blocks)
        plain[name] = copies[layer]

    layers = _layers_to_merge(listing, state)
    with progress_bar("merging", len(layers)) as advance:
        for path, layer in layers:
            name = path + layer.weight_leaf
            device = state[name].device  # a checkpoint's copy of a trained weight is on the CPU
            stored = {leaf: value.to(device) for leaf, value in layer.stored_in(state, path).items()}
            blocks = layer.blocks(state[name], stored)
            sync.run(f"merged weights: layer {path[:-1]!r}", merge_layer, name, layer, blocks)
            advance(1)
    sync.raise_on_any_rank()
    return plain


def _dequantize_state(
    quantised: Mapping[str, nn.Module], state: Mapping[str, Any], dtype: torch.dtype, rounding: Rounding
) -> dict[str, torch.Tensor]:
    """Return plain weights in place of quantised weights, merged with the adapters in a state dict."""
    plain = {}
    for name, module in quantised.items():
        path, adapter = name.removesuffix("weight"), layer_adapter(module)
        in_state = adapter is not None and path + adapter.stored_names()[0] in state
        stored = adapter.stored_in(state, path) if adapter is not None and in_state else None
        plain[name] = plain_weight(name, module, dtype, rounding, stored)
    rounding.tell(DEQUANTISED, IN_FLOAT32, stacklevel=4)
    return plain


def _layers_to_merge(listing: Listing, state: Mapping[str, Any]) -> list[tuple[str, AdaptedWeights]]:
    """Return each adapted layer with the beginning of its names in a state dict; a shared layer under each path.

    Raises:
        LoRAError: the state dict leaves out a weight to merge into, or a tensor of an adapter.
    """
    layers = [(path, adapter) for path, adapter in _adapters_by_path(listing) if not adapter.quantised()]
    names = [[path + leaf for leaf in (layer.weight_leaf, *layer.stored_names())] for path, layer in layers]
    whole = {layer for (_, layer), own in zip(layers, names, strict=True) if state.keys() >= set(own)}
    there = [
        (path, layer, own)
        for (path, layer), own in zip(layers, names, strict=True)
        if layer not in whole or not state.keys().isdisjoint(own)
    ]
    for path, _, own in there:
        missing = [name for name in own if name not in state]
        if missing:
            raise LoRAError(
                f"merged weights: the state dict of {type(listing.model).__name__} leaves out {missing[0]!r}, which is "
                "needed to merge an adapter; a program that loads it would run without that adapter. "
                "Keep the name in state_dict or on_save_checkpoint, leave the layer out with "
                f"exclude_modules=[{path[:-1]!r}], or save the adapter instead."
            )
    return [(path, layer) for path, layer, _ in there]


def _adapters_by_path(listing: Listing) -> list[tuple[str, AdaptedWeights]]:
    """Return each adapter with the beginning of its tensors' names; a shared adapter under each path."""
    modules = [(f"{name}." if name else "", module) for name, module in listing.places]
    return [(path, adapter) for path, module in modules for adapter in adapters_in(module).values()]


def refuse_unmergeable(listing: Listing, dtype: torch.dtype | None = None) -> None:
    """Raise LoRAError where merged weights cannot express an adapter of the model.

    Args:
        listing: of any module.
        dtype: of plain weights in place of quantised weights, or None where these stay.

    Raises:
        LoRAError: another module shares a layer's weight, the layer renormalises its weight, or the weight is quantised
            and stays quantised.
    """
    record_ties(listing.modules)
    for name, layer in listing.layers.items():
        if layer.quantised() and not layer.lora.why_not_merge:
            if dtype is None:
                refuse_quantised(name, layer.quantised())
            continue
        reason = layer.why_not_merge()
        if reason:
            raise LoRAError(
                f"merged weights: cannot express the adapter of {name!r}: {reason}. Leave the layer out "
                f"(exclude_modules=[{name!r}]), untie the weight, or save the adapter instead."
            )


def refuse_quantised(name: str, quantised: str) -> NoReturn:
    """Refuse to write merged weights because one weight is quantised, and say how to get plain weights.

    Raises:
        LoRAError: always.
    """
    raise LoRAError(
        f"merged weights: the weight of {name!r} is quantised ({quantised}), and quantising W' would lose much of the "
        'adapter. Choose a dtype for plain weights in its place, such as dequantize="bfloat16" (save_merged, '
        "merged_state_dict, merge_and_unload, LoRACallback), or save the adapter instead."
    )


def check_loads(places: NamedModules) -> None:
    """Let an injected model, and each module with adapters in it, look at what load_state_dict loads. In place.

    Args:
        places: every module of the model, under each of its names.
    """
    names = {name for name, module in places if isinstance(module, AdaptedModule)}
    names |= {outer for name in names for outer in ("", *parent_names(name))}
    for name, module in places:
        if name in names and not _hooks(module):
            module.register_load_state_dict_pre_hook(_check_load)  # type: ignore[no-untyped-call]


def stop_checking_loads(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of check_loads out of these modules. In place."""
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
        LoRAError: the state dict says that its weights are merged, and training has reached the adapter.
    """
    if ATTRIBUTE not in vars(module) and canonical(prefix.rstrip(".")):
        return
    listing = Listing(module)
    if metadata.get(_MERGED) and not all(layer.is_initial() for layer in listing.layers.values()):
        _refuse_merged(module)
    kept = {id(tensor) for layer in listing.layers.values() for tensor in layer.stored().values()}
    given = {canonical(key.removeprefix(prefix)): v for key, v in state_dict.items() if id(v) not in kept}
    factors = [(each, path + name) for path, each in _adapters_by_path(listing) for name in each.stored_names()]
    loaded = {adapter for adapter, name in factors if name in given}
    if loaded:
        missing += [prefix + name for adapter, name in factors if adapter not in loaded]
    else:
        _record_base(listing, given)


def _refuse_merged(module: nn.Module) -> NoReturn:
    raise LoRAError(
        'load_state_dict: the state dict holds merged weights, as save="merged" and merged_state_dict write them, and '
        f"the {type(module).__name__} to load it into has an adapter, which would be added to them a second time. "
        "Load the checkpoint with load_adapter(model, path), or its weights into a model without an adapter. Where a "
        'library loads the best checkpoint when fit ends, pass merge_after_fit=True beside save="merged", or '
        'save="full".'
    )


def _record_base(listing: Listing, given: Mapping[str, Any]) -> None:
    """Record the values of a complete base that is loaded as those from before training."""
    base = [name for name, _, module in listing.state() if not is_factor(name, module)]
    handle = find_model(listing, part=True)
    if handle is not None and given.keys() >= set(base):
        record_loaded(handle, {name: given[name] for name in base})
