"""An injected model as an adapter: its tensors, its description, and the fingerprint of its base."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter, Layer
from ..adapter.checks import check_factors
from ..adapter.fingerprint import (
    REMEDY,
    Entry,
    compare_fingerprints,
    entry_of,
    evenly_chosen,
    fingerprint_entries,
)
from ..adapter.metadata import without
from ..config import LoRAConfig
from ..distributed.sharding import copies_of, gather_all
from ..formats.peft_options import from_peft_entries
from ..matching import NameEnd, naming_some
from ..model.adapted_model import AdaptedModel
from ..model.facts import Why
from ..model.foreign_state import foreign_entries, without_base
from ..model.gradients import warn_of_untrained
from ..model.live_state import LiveState, open_state, original_value, original_values
from ..model.pretrained import base_name, pretrained_models, tied_to_input
from ..model.recorded_layers import refuse_replaced_layers
from ..model.wrappers import prefix_inside
from ..names import A, B, canonical, is_lightning_module, join_names
from ..nn.adapted_module import AdaptedModule, adapted_places
from ..nn.foreign_entries import ForeignEntries
from ..nn.lora_layer import LoRALayer
from ..nn.quantized import dtype_of, how_quantized, shape_of, with_options_of_4_bits

TABLES = (nn.Embedding, nn.EmbeddingBag)


def adapter_here(handle: AdaptedModel, verb: str = "load_adapter") -> Adapter:
    """Copy the adapter of an injected model, as it is. Collective where the model is sharded."""
    refuse_replaced_layers(handle, verb)
    live = open_state(handle)
    foreign = without_base(handle, foreign_entries(handle))
    return copied(replace(_without_tensors(live), tensors=gather_all(live.values()), foreign=foreign))


def adapter_in_state(live: LiveState, state: Mapping[str, Any], foreign: ForeignEntries) -> Adapter:
    """Copy the adapter to the CPU as a state dict of the model has it, such as an average. Collective where sharded.

    Parameters that the state dict lacks are the model's own, because training changed them. Buffers and extra states
    that it lacks were left out on purpose.

    Args:
        live: the model, from open_state.
        state: under names without wrappers' segments.
        foreign: the foreign entries of the state dict.
    """
    adapter = _without_tensors(live)
    left_out = {name for name in live.changing if name not in state and isinstance(live.tensors[name], nn.Parameter)}
    values = {**state, **gather_all(original_values(entry for entry in live.entries if entry[0] in left_out))}
    tensors = {name: values[name] for name in live.changing if name in values}
    complete = len(tensors) == len(live.changing)
    return copied(replace(adapter, tensors=tensors, complete=complete, foreign=foreign), on_cpu=True)


def copied(adapter: Adapter, *, on_cpu: bool = False) -> Adapter:
    """Return an adapter with copies of its tensors, extra states and foreign entries."""

    def copies(values: Mapping[str, Any]) -> dict[str, Any]:
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        own = copies_of(tensors, on_cpu=on_cpu)
        return {name: own[name] if name in own else copy.deepcopy(value) for name, value in values.items()}

    foreign = replace(adapter.foreign, values=copies(adapter.foreign.values))
    return replace(adapter, tensors=copies(adapter.tensors), foreign=foreign)


def adapter_of_model(handle: AdaptedModel, verb: str) -> Adapter:
    """Copy the adapter of an injected model. Collective where it is sharded.

    Args:
        handle: of the model.
        verb: what messages begin with.

    Raises:
        LoRAError: a layer was replaced, or the factors are not finite.
    """
    adapter = adapter_here(handle, verb)
    warn_of_untrained(handle, stacklevel=5)
    check_factors(adapter, verb)
    return adapter


def attached_adapter(handle: AdaptedModel, name: str) -> Adapter:
    """Copy an attached adapter of a model as plain LoRA, without its weight. Collective where the model is sharded.

    Args:
        handle: of the model.
        name: of the adapter.
    """
    layers = {n: layer for n, layer in handle.all_layers.items() if name in layer.attached()}
    kinds, tensors, described = handle.kinds_of(layers), dict[str, torch.Tensor](), dict[str, Layer]()
    for layer_name, layer in layers.items():
        pair = layer.attached()[name]
        described[layer_name] = Layer(pair.b.shape[1], pair.scaling, kinds[layer_name])
        for leaf, value in ((A, pair.a), (B, pair.b)):
            stored = layer.stored_name(leaf)
            owner = layer_name if stored == leaf else layer_name.rpartition(".")[0]  # of a single parameter
            tensors[join_names(owner, stored)] = value.clone()
    return replace(
        _without_tensors(open_state(handle)),
        tensors=tensors,
        layers=described,
        config=LoRAConfig(target_modules=list(layers)),
        complete=False,
        tables={},
        tied={},
        attached={},
    )


def frozen_values(handle: AdaptedModel, names: Collection[str]) -> dict[str, Any]:
    """Return frozen tensors of a model by name, whole on every rank. Collective where the model is sharded."""
    entries = handle.state() if names else []
    return gather_all({n: original_value(n, t, owner) for n, t, owner in entries if n in names and t is not None})


def _without_tensors(live: LiveState) -> Adapter:
    """Return the model's adapter without its tensors. Collective where the model is sharded.

    The fingerprint of a fitted model was taken at fit start, because weight averaging moves frozen weights. A weight
    that was unfrozen later is a tensor of the adapter and has no entry in the fingerprint.

    Args:
        live: the model, from open_state.
    """
    handle, injection = live.handle, live.handle.injection
    trained = live.changing
    at_fit_start = handle.fingerprint()
    first, layers = handle.layers, handle.layers_by_every_name  # as state dicts hold them
    kinds = {first[name]: kind for name, kind in handle.kinds.items()}
    tables = {name: layer for name, layer in layers.items() if layer.replaced_rows()}
    network = _network_prefix(live, trained)
    by_peft = tied_to_input(handle.modules, network)
    first_ends = {layer: by_peft.get(name, name) for name, layer in reversed(tables.items())}
    tied = {name: first_ends[layer] for name, layer in tables.items() if name != first_ends[layer]}
    base = base_name(handle.modules)
    return Adapter(
        tensors={},
        layers={
            name: Layer(layer.lora.spec.r, layer.lora.spec.scaling, kinds[layer], layer.lora.spec.enabled)
            for name, layer in layers.items()
            if layer in kinds
        },
        config=_options_here(handle),
        fingerprint=without(at_fit_start, trained) if at_fit_start else fingerprint_of(live),
        complete=True,
        network=network,
        pretrained=_pretrained_prefix(live, trained),
        weightless=_weightless(handle, layers),
        origin={**({"base_model_name_or_path": base} if base else {}), **injection.origin},
        scope=handle.scope(),
        tables={name: layer.replaced_rows() for name, layer in tables.items()},
        tied=tied,
        tied_by_peft=tied.items() <= by_peft.items(),
        attached=dict(injection.attached),
    )


def _options_here(handle: AdaptedModel) -> LoRAConfig:
    """Return the options without modules_to_save that lie outside of the handle's model.

    That model may be a part of the injected one. A head that stays behind is not asked for where the adapter is loaded.
    What a peft.LoraConfig takes by the end of a name is named by the words that files have.
    """
    config = handle.injection.config
    saved = config.modules_to_save or ()
    here = naming_some(saved, names := [canonical(name) for name, _ in handle.places]) if saved else []
    if any(isinstance(entry, NameEnd) for entry in here):
        here = from_peft_entries(here, (f"{name}.weight" for name in names))
    return config if tuple(here) == saved else replace(config, modules_to_save=here or None)


def _weightless(handle: AdaptedModel, layers: Collection[str]) -> frozenset[str]:
    """Return the names of modules without weights that end like a layer's name, as 1.proj, an nn.Identity, and 0.proj.

    A file tells the other modules by their tensors.
    """
    ends = {name.rpartition(".")[2] for name in layers}
    named_alike = ((name, module) for name, module in handle.places if name.rpartition(".")[2] in ends)
    return frozenset(name for name, module in named_alike if next(module.parameters(), None) is None)


def _network_prefix(live: LiveState, trained: Collection[str]) -> str:
    """Return the prefix 'name.' of the attribute of a LightningModule that holds all trained parameters.

    It is '' where there is none, and for any other module. Files hold an adapter under the network's own names.
    """
    model = live.handle.model
    if not is_lightning_module(model):
        return ""
    children = {name.partition(".")[0] for name in trained if isinstance(live.tensors[name], nn.Parameter)}
    if len(children) != 1 or children & live.handle.layers.keys():
        return ""
    name = children.pop()
    inside = {n for n, t in live.tensors.items() if isinstance(t, nn.Parameter) and n.startswith(f"{name}.")}
    if live.handle.injection.config.names_no_layer and inside <= set(trained):
        return ""  # the head itself
    return f"{name}.{prefix_inside(model.get_submodule(name))}"


def _pretrained_prefix(live: LiveState, trained: Collection[str]) -> str:
    """Return the prefix of a LightningModule's transformers model, if parameters outside of it were trained too.

    Of several models it is the one with most trained parameters. It is '' where there is none.
    """
    if not is_lightning_module(live.handle.model):
        return ""
    parameters = [name for name in trained if isinstance(live.tensors[name], nn.Parameter)]
    prefixes = [f"{canonical(name)}." for name in pretrained_models(live.handle.modules) if name]
    inside = {prefix: sum(name.startswith(prefix) for name in parameters) for prefix in prefixes}
    most = max(inside, key=lambda prefix: inside[prefix], default="")
    return most if most and 0 < inside[most] < len(parameters) else ""


def fingerprint_of(live: LiveState, expected: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
    """Return the entry of each frozen base parameter. Collective where the model is sharded.

    Args:
        live: the state of an injected model.
        expected: a fingerprint to compare with: what has no values there gets none. By default many parameters get
            none, those of which evenly_chosen leaves out.
    """
    trained = set(live.changing)
    frozen = {
        name: (tensor, owner)
        for name, tensor, owner in live.entries
        if name not in trained and tensor is not None and tensor.device.type != "meta"
    }
    how = {}
    for name, (tensor, owner) in frozen.items():
        if isinstance(owner, LoRALayer) and tensor is owner.adapted_weight():
            how[name] = with_options_of_4_bits(owner.quantized(), tensor)
        else:
            how[name] = with_options_of_4_bits(how_quantized(tensor, owner), tensor)
    moving = _tables_that_move(live)
    telling = [name for name in frozen if not how[name] and name not in moving]
    if expected is None:
        chosen = evenly_chosen(telling)
    else:
        chosen = {name for name in telling if name in expected and expected[name].values}
    entries: dict[str, Entry] = {}
    values = fingerprint_entries((name, original_value(name, *frozen[name])) for name in telling if name in chosen)
    for name, (tensor, _) in frozen.items():
        dtype = dtype_of(tensor) if how[name] else tensor.dtype
        entries[name] = values.get(name) or entry_of(shape_of(tensor), dtype, quantized=how[name])
    return entries


def _tables_that_move(live: LiveState) -> set[str]:
    """Return the names of tables whose values tell no base from another.

    The adapter replaces some of their rows, or each forward renormalises them in place: an embedding with max_norm
    that is not adapted.
    """
    renormalised = [
        name.rpartition(".")[0]
        for name, _, owner in live.entries
        if isinstance(owner, TABLES) and owner.max_norm is not None and not isinstance(owner, AdaptedModule)
    ]
    places = adapted_places(live.handle.model, modules=live.handle.places)
    replaced = [name for name, _, each in places if each.replaced_rows()]
    return {join_names(table, "weight") for table in (*renormalised, *replaced)}


def check_fingerprint(
    live: LiveState,
    expected: Mapping[str, Entry],
    *,
    strict: bool = True,
    remedy: str = REMEDY,
    why: Sequence[Why] = ("unfrozen", "resized"),
) -> None:
    """Raise LoRAError, or warn, where a frozen parameter differs from a fingerprint by more than rounding.

    Args:
        live: an injected model.
        expected: the fingerprint.
        strict: whether another base is an error or a warning.
        remedy: the advice at the end of the error.
        why: parameters that are trained for these reasons count by their values from before; all, where it is empty.
    """
    if not expected:
        return
    initial = fingerprint_entries(live.handle.initial_of(*why).items())
    present = initial | fingerprint_of(live, expected)
    # A fingerprint made of a file has entries of buffers. Training changes buffers, so they do not tell a base.
    buffers = {name for name in live.changing if not isinstance(live.tensors[name], nn.Parameter)}
    expected = {name: entry for name, entry in expected.items() if name not in buffers}
    compare_fingerprints(present, expected, strict=strict, remedy=remedy)
