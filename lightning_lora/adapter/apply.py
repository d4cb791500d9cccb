"""Fitting an adapter onto a model: base, names, shapes and layers are compared first, then the values are copied."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import copy_
from ..errors import LoRAError
from ..model.injection import record_trainable, require_injection
from ..model.merging import is_merged, merge, unmerge
from ..model.named_state import base_parameters, named_state
from ..model.state_dict import adapter_keys, base_keys
from ..names import A, B, canonical, near_misses
from ..nn.conv import LoRAConv
from ..nn.layer_kinds import layer_kinds
from ..nn.lora_layer import adapted_layers
from .adapter import Adapter, align_to_modules, check_finite
from .fingerprint import check_fingerprint, fingerprint_entry


def check_adapter(model: nn.Module, adapter: Adapter, *, strict_base: bool = True) -> None:
    """Compare an adapter with an injected model: layers, scaling, names, shapes, finite values, base.

    Raises:
        LoRAError: names the first thing that differs.
    """
    try:
        _check_tensors(model, adapter)
    except LoRAError as error:
        raise LoRAError(f"{error}{_other_options(model, adapter)}") from None
    try:
        check_fingerprint(model, adapter.fingerprint)
    except LoRAError as error:
        if strict_base:
            raise
        warnings.warn(f"lightning_lora: {error}", stacklevel=2)


def _check_tensors(model: nn.Module, adapter: Adapter) -> None:
    layers, first = adapted_layers(model), _first_names(model)
    _same_names("layer", map(first, adapter.layers()), layers)
    for name, layer in layers.items():
        scaling = adapter.scalings.get(name)
        if scaling is not None and not math.isclose(scaling, layer.lora.spec.scaling):
            raise LoRAError(
                f"adapter: layer {name!r} was trained with a scaling (lora_alpha over r) of {scaling:g}, but the model "
                f"was injected with {layer.lora.spec.scaling:g}; use the adapter's own options."
            )
        if isinstance(layer, LoRAConv):
            _refuse_loralib_convolution(name, layer, adapter.tensors)
    _same_kinds(model, adapter)
    live = {name: tensor for name, tensor, _ in named_state(model)}
    wanted = [name for name in adapter_keys(model) if adapter.complete or isinstance(live[name], nn.Parameter)]
    judged = set(wanted)
    given = [name for name in adapter.tensors if name not in live or name in judged]
    _same_names("tensor", map(first, given), map(first, wanted))
    for name, value in adapter.tensors.items():
        _check_tensor(name, value, live[name])


def _refuse_loralib_convolution(name: str, layer: LoRAConv, tensors: Mapping[str, Any]) -> None:
    """Its B @ A is the weight seen as (out * k, in * k), whose rank seen as (out, in * k * k) is too high for ours."""
    a, b = tensors.get(f"{name}.{A}"), tensors.get(f"{name}.{B}")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() == 2:
        shape_a, shape_b = layer.factor_shapes()
        raise LoRAError(
            f"adapter: {name!r} is a convolution factorised as in loralib, A (r * k, in * k) {tuple(a.shape)} and B "
            f"(out * k, r * k) {tuple(b.shape)}, whose product A {shape_a} and B {shape_b} cannot express. Merge it "
            "where it was trained (loralib: model.eval()) and load those weights as the base."
        )


def _other_options(model: nn.Module, adapter: Adapter) -> str:
    """Which options the adapter has and the model has not, for an error that they explain."""
    model_config = require_injection(model, "load_adapter").record.config
    differences = (adapter.config or model_config).differences(model_config)
    return f" The options differ: {'; '.join(differences)}." if differences else ""


def _same_kinds(model: nn.Module, adapter: Adapter) -> None:
    """A square weight fits a layer that stores its transpose too; the adapter would act on the wrong side."""
    kinds = layer_kinds(model)
    for name, kind in adapter.kinds.items():
        if kinds[name] != kind:
            raise LoRAError(
                f"adapter: layer {name!r} was a {kind} layer where the adapter was trained, here it is {kinds[name]}; "
                "the adapter belongs to another model."
            )


def _check_tensor(name: str, value: Any, live: torch.Tensor | None) -> None:
    if live is None:
        return  # extra state, the owner's own business
    if not isinstance(value, torch.Tensor) or value.shape != live.shape:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoRAError(f"adapter: {name!r} must have shape {tuple(live.shape)}, but has {found}.")
    if value.is_floating_point() != live.is_floating_point():
        raise LoRAError(f"adapter: {name!r} must be {live.dtype}, but is {value.dtype}.")
    if value.is_floating_point() and isinstance(live, nn.Parameter):
        check_finite(name, value)


def _same_names(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    given, wanted = list(given), list(wanted)
    missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unexpected:
        first = (
            f"{what} {missing[0]!r} is missing" if missing else f"{what} {unexpected[0]!r} has no place in the model"
        )
        hint = near_misses(*(missing[0], given) if missing else (unexpected[0], wanted))
        raise LoRAError(
            f"adapter: {first} (in all {len(missing)} missing, {len(unexpected)} unexpected){hint}. The adapter was "
            "saved from a model with other layers or options."
        )


def split_off_base(model: nn.Module, adapter: Adapter) -> Adapter:
    """Base weights in a source without a fingerprint tell which base it is; they are no part of the adapter.

    Such are a whole state dict and the targeted embeddings that PEFT writes. Single base weights in a bare adapter
    state dict were trained by another hand, and are.
    """
    given, keys = adapter.tensors.keys(), set(adapter_keys(model))
    whole = adapter.config is not None or given >= set(base_keys(model))
    if adapter.fingerprint or adapter.complete or not whole:
        return adapter
    frozen = {name for name, tensor, _ in named_state(model) if tensor is not None and name not in keys} & given
    return replace(
        adapter,
        tensors={name: value for name, value in adapter.tensors.items() if name not in frozen},
        fingerprint={name: fingerprint_entry(adapter.tensors[name]) for name in sorted(frozen)},
    )


def align_names(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter under the one prefix at which its layers are modules of the model."""
    every = {canonical(name) for name, _ in model.named_modules(remove_duplicate=False)}
    if every.issuperset(adapter.layers()):
        return align_to_modules(adapter, every, type(model).__name__)
    return align_to_modules(adapter, {canonical(name) for name, _ in model.named_modules()}, type(model).__name__)


def by_first_names(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter by the names that modules are adapted by, where a module comes under several."""
    first_name = _first_names(model)
    return adapter.with_names(first_name, first_name)


def _first_names(model: nn.Module) -> Callable[[str], str]:
    """Where a module comes under several names: from any name of a layer or tensor to the one that it is adapted by."""
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    first = {module: canonical(name) for name, module in model.named_modules()}

    def first_name(name: str) -> str:
        if name in modules:
            return first[modules[name]]
        path, _, leaf = name.rpartition(".")
        return f"{first[modules[path]]}.{leaf}".lstrip(".") if path in modules else name

    return first_name


def record_trained(model: nn.Module, adapter: Adapter) -> None:
    """What another callback had unfrozen in the saved run counts as trained here too; call before loading it."""
    injected = require_injection(model, "load_adapter")
    record = injected.record
    for name, parameter in base_parameters(injected.root).items():
        if injected.name_seen(name) in adapter.tensors and name not in record.trained:
            record.trained.add(name)
            record.unfrozen.add(name)
            record.initial[name] = parameter.detach().clone()


def add_frozen_weights(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the base weights that were frozen when it was saved and are trained here: as they were then."""
    injected = require_injection(model, "load_adapter")
    unfrozen = injected.seen({name: injected.record.initial[name] for name in injected.record.unfrozen})
    frozen = {name: value for name, value in unfrozen.items() if name in adapter.fingerprint}
    return replace(adapter, tensors={**frozen, **adapter.tensors})


def copy_values(model: nn.Module, adapter: Adapter) -> None:
    """Write an adapter's values into the live tensors, all of them or none.

    W' may be beyond its dtype where the model is merged, or an owner of extra state may refuse it.
    """
    before = is_merged(model)
    if before:
        unmerge(model)
    record = require_injection(model, "load_adapter").record
    before_loading = set(record.trained), set(record.unfrozen), dict(record.initial)
    old = {
        name: owner.get_extra_state() if tensor is None else tensor.detach().clone()
        for name, tensor, owner in named_state(model)
        if name in adapter.tensors
    }
    try:
        record_trained(model, adapter)
        _write(model, adapter.tensors)
        record_trainable(model, expected=True)
        if before:
            merge(model)
    except BaseException:
        record.trained, record.unfrozen, record.initial = before_loading
        _write(model, old)
        if before:
            merge(model)
        raise


def _write(model: nn.Module, values: Mapping[str, Any]) -> None:
    live = {name: (tensor, owner) for name, tensor, owner in named_state(model)}
    for name, value in values.items():
        tensor, owner = live[name]
        if tensor is None:
            owner.set_extra_state(value)
        else:
            copy_(tensor, value)
