"""State dicts of an injected model: what training can change, and the plain model with merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..distributed.flat import gather_flat, owns_flat
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import is_spread
from ..errors import LoRAError
from ..names import canonical
from ..nn.adapted_module import adapters_by_path, is_factor, layer_adapter
from ..nn.adapted_weights import AdaptedWeights, Blocks
from ..nn.attached_factors import LACKING
from ..nn.claims import OFF, claimed
from ..nn.foreign_entries import metadata_of, with_metadata
from ..nn.quantized import quantization_entries
from ..nn.rounding import Rounding
from ..nn.tied_weights import record_ties
from ..progress import progress_bar
from .adapted_model import AdaptedModel, Listing, open_model
from .dequantize import DEQUANTIZED, IN_FLOAT32, dequantize_dtype, dequantized_weight, quantized_weights
from .foreign_state import foreign_entries, foreign_names, without_base
from .gradients import warn_of_untrained
from .live_state import open_state, original_values
from .load_state_dict import mark_merged
from .recorded_layers import refuse_replaced_layers


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
    with claimed("adapter_state_dict", handle.injection.claims):
        refuse_replaced_layers(handle, "adapter_state_dict")
        warn_of_untrained(handle)
        state, foreign = gather_flat(open_state(handle).values()), without_base(handle, foreign_entries(handle))
    metadata, attached = dict(foreign.versions), handle.injection.attached
    if attached:
        metadata[""] = {**metadata.get("", {}), LACKING: [*attached]}
    return with_metadata(state | dict(foreign.values), metadata) if metadata else state


def merged_state_dict(model: nn.Module, *, dequantize: torch.dtype | str | None = None) -> dict[str, Any]:
    """Return the state dict of the plain model with merged weights. The model is not changed, and may be merged.

    Collective where the model is sharded. Where DeepSpeed's stage 3 or FSDP1 divides it, every rank gets all of it;
    save_merged takes less memory.

    Args:
        model: an injected model.
        dequantize: the dtype of plain weights in place of quantized weights, adapted or not.

    Raises:
        LoRAError: the model was not injected, a layer was replaced since, or an adapter cannot be expressed by a merged
            weight, such as that of a quantized weight without `dequantize`.

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
    handle = open_model(model, "merged_state_dict", attached=True)
    with claimed("merged_state_dict", handle.injection.claims):
        refuse_replaced_layers(handle, "merged_state_dict")
        warn_of_untrained(handle)
        whole = _state_to_merge(handle)
        return mark_merged(gather_flat(merge_state_dict(handle, whole, dtype)), metadata_of(whole))


def _state_to_merge(handle: AdaptedModel) -> dict[str, Any]:
    """Return what state_dict() does, with slices of flat weights. FSDP1 would gather all weights for state_dict().

    Where initial values are in the places of trained ones, state_dict() is refused.
    """
    entries = handle.state()
    if any(owns_flat(module) for _, module in handle.modules) or handle.injection.claims.holds(OFF):
        return original_values(entries)
    spread = original_values(entry for entry in entries if is_spread(entry[1]))  # state_dict() shows no flat values
    state = handle.model.state_dict()
    metadata = {canonical(name): version for name, version in metadata_of(state).items()}
    return with_metadata({canonical(name): value for name, value in state.items()} | spread, metadata)


def merge_state_dict(listing: Listing, state: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return a state dict of the plain model: each adapter is merged into a copy of its weight and left out.

    Args:
        listing: of the model. It says which names belong to adapted layers; live values are used of quantized weights
            alone.
        state: the full state dict, under names without the segments of wrappers. Its values may differ from the
            model's.
        dtype: of plain weights in place of quantized weights, or None where these stay.

    Raises:
        LoRAError: an adapter cannot be merged, or `state` leaves out one of its tensors or its weight.
        NonFiniteError: a merged weight is not finite, on any rank.
    """
    refuse_unmergeable(listing, dtype)
    quantized = {name: module for name, module in quantized_weights(listing.places).items() if name in state}
    owners = {name: module for name, _, module in listing.state()}
    plain = {name: state[name] for name, module in owners.items() if name in state and not is_factor(name, module)}
    plain |= {name: state[name] for name in foreign_names(listing, state, owners)}
    sync = RankSync(value for value in state.values() if isinstance(value, torch.Tensor))
    if dtype is None:
        plain |= {name: state[name] for name in quantization_entries(state, quantized)}
    else:
        plain |= _dequantize_state(quantized, state, dtype, Rounding(sync))

    copies: dict[AdaptedWeights, torch.Tensor] = {}

    def merge_layer(name: str, layer: AdaptedWeights, blocks: Blocks) -> None:
        if layer not in copies:  # a shared layer is merged once
            copies[layer] = layer.merged_weight(state[name], blocks)
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
    quantized: Mapping[str, nn.Module], state: Mapping[str, Any], dtype: torch.dtype, rounding: Rounding
) -> dict[str, torch.Tensor]:
    """Return plain weights in place of quantized weights, merged with the adapters in a state dict."""
    plain = {}
    for name, module in quantized.items():
        path, adapter = name.removesuffix("weight"), layer_adapter(module)
        in_state = adapter is not None and all(path + leaf in state for leaf in adapter.stored_names())
        stored = adapter.stored_in(state, path) if adapter is not None and in_state else None
        plain[name] = dequantized_weight(name, module, dtype, rounding, stored)
    rounding.tell(DEQUANTIZED, IN_FLOAT32, stacklevel=4)
    return plain


def _layers_to_merge(listing: Listing, state: Mapping[str, Any]) -> list[tuple[str, AdaptedWeights]]:
    """Return each adapted layer with the beginning of its names in a state dict; a shared layer under each path.

    Raises:
        LoRAError: the state dict leaves out a weight to merge into, or a tensor of an adapter.
    """
    layers = [(path, adapter) for path, adapter in adapters_by_path(listing.places) if not adapter.quantized()]
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


def refuse_unmergeable(listing: Listing, dtype: torch.dtype | None = None) -> None:
    """Raise LoRAError where merged weights cannot express an adapter of the model.

    Args:
        listing: of any module.
        dtype: of plain weights in place of quantized weights, or None where these stay.

    Raises:
        LoRAError: another module shares a layer's weight, or the weight is quantized and stays quantized.
    """
    record_ties(listing.modules)
    for name, layer in listing.all_layers.items():
        if layer.quantized() and not layer.lora.why_not_merge:
            if dtype is None:
                refuse_quantized(name, layer.quantized())
            continue
        reason = layer.why_not_merge()
        if reason:
            raise LoRAError(
                f"merged weights: cannot express the adapter of {name!r}: {reason}. Leave the layer out "
                f"(exclude_modules=[{name!r}]), untie the weight, or save the adapter instead."
            )


def refuse_quantized(name: str, quantized: str) -> NoReturn:
    """Refuse to write merged weights because one weight is quantized, and say how to get plain weights.

    Raises:
        LoRAError: always.
    """
    raise LoRAError(
        f"merged weights: the weight of {name!r} is quantized ({quantized}), and quantizing W' would lose much of the "
        'adapter. Choose a dtype for plain weights in its place, such as dequantize="bfloat16" (save_merged, '
        "merged_state_dict, merge_and_unload, LoRACallback), or save the adapter instead."
    )
