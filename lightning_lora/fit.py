"""How an adapter is put onto a model: inject, check layers, base, names and shapes, and only then copy the values."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, check_pairs, first_names, placed
from .base import A, B
from .config import LoRAConfig
from .errors import LoRAError
from .inject import inject, unload
from .injection import base_parameters, find_injection, named_state, note_trainable, require_injection
from .layers import LoRAConv
from .merge import adapted_layers, is_merged, merge, unmerge
from .state import adapter_keys, base_keys, check_fingerprint, print_of
from .targets import Targets, near_misses


def fit_(model: nn.Module, adapter: Adapter, *, strict_base: bool = True) -> list[str]:
    """Put an adapter onto a model: inject where that is still to do, check everything, then copy the values.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    check_pairs(adapter)
    adapter = placed(model, adapter).renamed(first_names(model))
    fresh = find_injection(model) is None
    if fresh:
        inject(model, _config_for(model, adapter))
    try:
        adapter = _base_apart(model, adapter)
        check_fit(model, adapter, strict_base=strict_base)
        _copy(model, adapter)
    except BaseException:
        if fresh:
            unload(model)
        raise
    return list(adapted_layers(model))


def check_fit(model: nn.Module, adapter: Adapter, *, strict_base: bool = True) -> None:
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
    layers, first = adapted_layers(model), first_names(model)
    _same_names("layer", map(first, adapter.layers()), layers)
    for name, layer in layers.items():
        scaling = adapter.scalings.get(name)
        if scaling is not None and not math.isclose(scaling, layer.lora_scaling):
            raise LoRAError(
                f"adapter: layer {name!r} was trained with a scaling (lora_alpha over r) of {scaling:g}, but the model "
                f"was injected with {layer.lora_scaling:g}; use the adapter's own options."
            )
        if isinstance(layer, LoRAConv):
            _refuse_loralib_convolution(name, layer, adapter.tensors)
    live = {name: tensor for name, tensor, _ in named_state(model)}
    wanted = [name for name in adapter_keys(model) if adapter.complete or isinstance(live[name], nn.Parameter)]
    given = [name for name in adapter.tensors if name not in live or name in wanted]
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
    ours = require_injection(model, "adapter")[2].config
    theirs = adapter.config or ours
    values = ((name, getattr(theirs, name), getattr(ours, name)) for name in theirs.differing(ours))
    differing = "; ".join(f"{name} was {before!r}, now {now!r}" for name, before, now in values)
    return f" The options differ: {differing}." if differing else ""


def _check_tensor(name: str, value: Any, live: torch.Tensor | None) -> None:
    if live is None:
        return  # extra state, the owner's own business
    if not isinstance(value, torch.Tensor) or value.shape != live.shape:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoRAError(f"adapter: {name!r} must have shape {tuple(live.shape)}, but has {found}.")
    if value.is_floating_point() and name.rpartition(".")[2] in (A, B) and not torch.isfinite(value).all():
        raise LoRAError(f"adapter: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")


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


def _base_apart(model: nn.Module, adapter: Adapter) -> Adapter:
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
        fingerprint={name: print_of(adapter.tensors[name]) for name in sorted(frozen)},
    )


def _config_for(model: nn.Module, adapter: Adapter) -> LoRAConfig:
    """The adapter's options; where they choose other layers under this prefix, the same with the layers spelled out."""
    config = adapter.config
    if config is None:
        raise LoRAError(
            "adapter: the source stores no options (r and lora_alpha cannot be told from tensors alone); call "
            "inject(model, LoRAConfig(...)) with those of the training first."
        )
    layers = adapter.layers()
    targets = Targets(model, config)
    if not targets.unmatched and set(targets.layers) == set(layers):
        return config
    alphas = {n: s * (math.sqrt(r) if config.use_rslora else r) for n, s, r in _ranks(adapter)}
    return replace(
        config,
        target_modules=layers,
        exclude_modules=None,
        rank_pattern={re.escape(n): r for n, _, r in _ranks(adapter)},
        alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()},
    )


def _ranks(adapter: Adapter) -> list[tuple[str, float, int]]:
    return [(name, scaling, adapter.tensors[f"{name}.{B}"].shape[1]) for name, scaling in adapter.scalings.items()]


def note_trained(model: nn.Module, adapter: Adapter) -> None:
    """What another callback had unfrozen in the saved run counts as trained here too; call before loading it."""
    prefix, root, injection = require_injection(model, "adapter")
    path = f"{prefix}." if prefix else ""
    for name, parameter in base_parameters(root).items():
        if path + name in adapter.tensors and name not in injection.trained:
            injection.trained.add(name)
            injection.initial[name] = parameter.detach().clone()


def _copy(model: nn.Module, adapter: Adapter) -> None:
    """Into the live tensors, all of them or none: W' may still be beyond its dtype, or an owner refuse its state."""
    before = is_merged(model)
    if before:
        unmerge(model)
    injection = require_injection(model, "adapter")[2]
    trained, initial = set(injection.trained), dict(injection.initial)
    old = {
        name: owner.get_extra_state() if tensor is None else tensor.detach().clone()
        for name, tensor, owner in named_state(model)
        if name in adapter.tensors
    }
    try:
        note_trained(model, adapter)
        _write(model, adapter.tensors)
        note_trainable(model, expected=True)
        if before:
            merge(model)
    except BaseException:
        injection.trained, injection.initial = trained, initial
        _write(model, old)
        if before:
            merge(model)
        raise


def _write(model: nn.Module, values: Mapping[str, Any]) -> None:
    live = {name: (tensor, owner) for name, tensor, owner in named_state(model)}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in values.items():
            tensor, owner = live[name]
            if tensor is None:
                owner.set_extra_state(value)
            else:
                tensor.copy_(value)
