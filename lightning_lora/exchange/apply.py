"""Put an adapter onto a model: inject, compare base, layers, names and shapes, then copy all values or none."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import REMEDY
from ..adapter.layer_options import exact_options, options_hold, with_exact_ranks
from ..config import LoRAConfig
from ..distributed.sharding import copies_of, copy_all_
from ..distributed.zero import update_copies_
from ..errors import LoRAError
from ..formats.peft_attention import refuse_conv1d_of_model
from ..formats.peft_stacks import stacks_as_in_model
from ..matching import Unmatched, matcher
from ..model.adapted_model import AdaptedModel, Listing
from ..model.foreign_state import foreign_entries, load_foreign_
from ..model.inject import inject_to_load, unload
from ..model.live_state import LiveState, open_state
from ..model.merging import holds_merged, merge_listed, unmerge_listed
from ..model.quantise import quantise_named_
from ..model.targets import select
from ..names import listed
from ..nn.foreign_entries import ForeignEntries
from ..nn.low_rank import CONV1D
from ..nn.owner import claimed
from ..nn.quantised import NF4, quantised_parameters
from ..notices import tell
from .align import add_frozen_weights, align_names, record_trained, split_off_base, split_off_foreign
from .first_names import Names, by_first_names
from .fit_checks import Specs, check_adapter, specs_for
from .take import check_fingerprint


def copy_values(live: LiveState, adapter: Adapter, specs: Specs | None = None, *, merge_after: bool = False) -> None:
    """Write an adapter's values into the live tensors, all of them or none. In place.

    Copying can fail: merging may find that W' is beyond its dtype, and a module may refuse its extra state.

    Args:
        live: an injected model, unmerged; after an error it is unmerged too.
        adapter: checked by check_adapter.
        specs: from specs_for. A factor of another rank gets new memory and loses its gradient; the parameter object
            stays.
        merge_after: whether the model is merged then. If that fails, the old values are put back.
    """
    handle = live.handle
    record, recorded, config_before = handle.record, handle.record.snapshot(), handle.record.config
    specs_before = {layer: layer.lora.spec for layer in specs or {}}
    factors = [factor for layer, spec in specs_before.items() for factor, _ in layer.shapes_by(spec)]
    memory = [(factor, factor.data, factor.grad) for factor in factors]
    values_before = _values_now(live, adapter.tensors)
    foreign_before = copy.deepcopy(foreign_entries(handle)) if adapter.foreign.values else ForeignEntries()
    try:
        record_trained(live, adapter)
        _take_specs_(handle, adapter, specs or {})
        _write_(live, adapter.tensors)
        load_foreign_(live, adapter.foreign)
        handle.record_trainable(expected=True)
        if merge_after:
            merge_listed(handle, warns_of_untrained=False)
    except BaseException:
        record.restore(recorded)
        record.config = config_before
        for layer, spec in specs_before.items():
            layer.lora.spec = spec
        for factor, data, gradient in memory:
            factor.data = data
            factor.grad = gradient
        _write_(live, values_before)
        load_foreign_(live, foreign_before)
        raise


def _values_now(live: LiveState, names: Iterable[str]) -> dict[str, Any]:
    tensors = {name: live.tensors[name] for name in names}
    states = {name: cast(Any, live.owners[name]).get_extra_state() for name, value in tensors.items() if value is None}
    return states | copies_of({name: value for name, value in tensors.items() if value is not None})


def _take_specs_(handle: AdaptedModel, adapter: Adapter, specs: Specs) -> None:
    """Give the layers and the model's options the adapter's ranks and scalings. In place."""
    if not specs or adapter.config is None:
        return
    record = handle.record
    resized = [layer.lora.name for layer, spec in specs.items() if spec.r != layer.lora.spec.r]
    in_training = any(factor.grad is not None for layer in specs for factor in layer.factors())
    for layer, spec in specs.items():
        layer.take_spec_(spec)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    config = replace(record.config, **{name: getattr(adapter.config, name) for name in names})
    layers = [layer.lora for layer in handle.layers.values() if layer.kind()]
    ranks, scalings = ({s.name: getattr(s.spec, field) for s in layers} for field in ("r", "scaling"))
    record.config = config if options_hold(config, ranks, scalings) else with_exact_ranks(config, ranks, scalings)
    if resized and in_training:
        warnings.warn(
            f"lightning_lora: load_adapter: {len(resized)} layers that have gradients get another rank, first "
            f"{resized[0]!r}. An optimizer goes on with these parameters, but what it has gathered of them does not "
            "fit: clear that (optimizer.state.clear()), or build it anew.",
            stacklevel=5,
        )


def _write_(live: LiveState, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if live.tensors[name] is None:
            owner = cast(Any, live.owners[name])
            owner.set_extra_state(copy.deepcopy(value))  # an adapter in memory does not change with the model
    written = [(tensor, value) for name, value in values.items() if (tensor := live.tensors[name]) is not None]
    copy_all_(written)
    update_copies_(written)


def apply_adapter(
    listing: Listing, adapter: Adapter, *, strict_base: bool = True, remedy: str = REMEDY, swap: bool = False
) -> list[str]:
    """Put an adapter onto a model: inject it if needed, check everything, then copy the values. In place.

    Args:
        listing: of the model without wrappers; its handle where it is injected.
        adapter: under any prefix.
        strict_base: whether another base than the adapter's is an error or a warning.
        remedy: the advice at the end of the error about another base.
        swap: whether layers of an injected model may get another rank and scaling.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    names = Names(listing.places)
    adapter = by_first_names(names, align_names(listing, names, adapter))
    fresh = not isinstance(listing, AdaptedModel)
    if isinstance(listing, AdaptedModel):
        handle = listing
        _tell_of_options(handle, adapter)
    else:
        handle = inject_to_load(listing, config_for(listing, adapter), adapter.scope)
    with claimed("load_adapter", handle.record.owner):
        was_merged = holds_merged(handle.layers.values())
        try:
            if was_merged:
                unmerge_listed(handle)  # at once: reading W out of W' takes as long
            adapter = _as_in_model(adapter, handle.kinds)
            live = open_state(handle)
            adapter = add_frozen_weights(live, split_off_base(live, split_off_foreign(live, adapter)))
            specs = {} if fresh or not swap else specs_for(handle, by_first_names(names, adapter))
            check_adapter(live, names, adapter, specs=specs)
            check_fingerprint(live, adapter.fingerprint, strict=strict_base, remedy=remedy)
            copy_values(live, adapter, specs, merge_after=was_merged)
            handle.record.origin = dict(adapter.origin)
        except BaseException:
            if fresh:
                unload(handle.model)
            elif was_merged:
                merge_listed(handle)
            raise
    _tell_of_narrower(live, adapter)
    return list(handle.layers)


def _tell_of_narrower(live: LiveState, adapter: Adapter) -> None:
    """Say that what was trained whole, such as a head, has fewer digits in this model than in the adapter."""
    for name, value in adapter.beside_factors().items():
        here = live.tensors[name]
        if not isinstance(here, nn.Parameter) or not here.is_floating_point():
            continue
        if torch.finfo(here.dtype).eps > torch.finfo(value.dtype).eps:
            was, dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (value, here))
            tell(
                f"lightning_lora: load_adapter: {name!r} was trained in {was} and is rounded to {dtype}, as this model "
                f"has it. To keep its values, cast its module to {was} before loading."
            )
            return


def _as_in_model(adapter: Adapter, kinds: Mapping[str, str]) -> Adapter:
    """Return an adapter of PEFT's with factors as a model with layers of these kinds has them."""
    if adapter.peft_version is None:
        return adapter
    refuse_conv1d_of_model(adapter, next((name for name, kind in kinds.items() if kind == CONV1D), None), "adapter")
    return replace(stacks_as_in_model(adapter, kinds), peft_version=None)


def quantise_as_trained_(listing: Listing, adapter: Adapter) -> None:
    """Quantise the layers of a new model that quantize_base had quantised where an adapter was trained. In place.

    Args:
        listing: of the model. Layers that are quantised or adapted already stay as they are.
        adapter: under any prefix.

    Raises:
        LoRAError: torchao is missing, or a weight cannot be quantised.
    """
    if any(entry.quantised == NF4 for entry in adapter.fingerprint.values()):
        names = Names(listing.places)
        adapter = by_first_names(names, align_names(listing, names, adapter))
        quantised = {name for name, entry in adapter.fingerprint.items() if entry.quantised == NF4}
        layers = [(name, module) for name, module in listing.modules if f"{name}.weight" in quantised]
        quantise_named_(listing, [name for name, module in layers if not quantised_parameters(module)])


def _tell_of_options(handle: AdaptedModel, adapter: Adapter) -> None:
    """Log the model's options, which hold if the source has none."""
    if adapter.config is None:
        options = handle.record.config
        scale = f"lora_alpha={options.lora_alpha:g}, use_rslora={options.use_rslora}"
        tell(f"lightning_lora: the source stores no options; those of the injected model hold: {scale}")


def config_for(listing: Listing, adapter: Adapter) -> LoRAConfig:
    """Return the adapter's options. If they would choose other layers in this model, name the layers instead."""
    config, ranks = adapter.config, adapter.ranks()
    if config is None:
        stored = sorted(set(ranks.values()))
        saved = _leaves(adapter.saved_modules())
        raise LoRAError(
            "adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank "
            f"{' and '.join(map(str, stored))}; lora_alpha is nowhere in it and must come from whoever trained it. "
            f"Call inject(model, LoRAConfig(r={stored[0]}, lora_alpha=..., target_modules=[{_leaves(ranks)}]"
            f"{f', modules_to_save=[{saved}]' if saved else ''})) first, then load_adapter again."
        )
    targets = select(listing.modules, config, adapter.scope)
    same_layers = targets.unmatched == Unmatched() and targets.names() == set(ranks)
    if not adapter.fingerprint:  # with one, all that was trained is known
        _warn_of_lacking(sorted(targets.names() - ranks.keys()))
    same = same_layers and options_hold(config, ranks, adapter.scalings)
    config = config if same else _options_for(listing, config, adapter)
    same_rows = targets.tables.items() >= adapter.tables.items()
    return config if same_rows else replace(config, trainable_token_indices=dict(adapter.tables))


def _warn_of_lacking(layers: Sequence[str]) -> None:
    """Warn of layers that an adapter's options name, and for which it has no tensors."""
    if layers:
        warnings.warn(
            f"lightning_lora: adapter: it has no tensors for {listed(layers)}, which its options name in this model. "
            "It is loaded without them. If it was trained on them, its file is not whole.",
            stacklevel=5,
        )


def _options_for(listing: Listing, config: LoRAConfig, adapter: Adapter) -> LoRAConfig:
    """Return options that name the adapter's layers: by a list, or by an expression where a list takes others too."""
    exact = exact_options(config, adapter.ranks(), adapter.scalings, adapter.parameters)
    layers, is_named = dict.fromkeys(adapter.module_layers), matcher(exact.target_modules)  # in order, as files have it
    if all(name in layers or not is_named(name) for name, _ in listing.modules):
        return exact
    return replace(exact, target_modules="|".join(map(re.escape, layers)))


def _leaves(modules: Iterable[str]) -> str:
    """Return the last segments of module names, quoted, as the text of a list."""
    return ", ".join(map(repr, dict.fromkeys(module.rpartition(".")[2] for module in modules)))
