"""Fitting an adapter onto a model: base, names, shapes and layers are compared first, then the values are copied."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, placed, spelled_out, without_options
from .base import B, canonical
from .config import LoRAConfig
from .errors import LoRAError
from .inject import inject, unload
from .injection import base_parameters, find_injection, named_state, note_trainable, require_injection
from .kinds import kinds_of
from .merge import adapted_layers, is_merged, merge, unmerge
from .state import adapter_keys, check_fingerprint
from .targets import Targets, near_misses


def fit_(model: nn.Module, adapter: Adapter, *, strict_base: bool = True) -> list[str]:
    """Put an adapter onto a model: inject where that is still to do, check everything, then copy the values.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    adapter = placed_on(model, adapter)
    fresh = find_injection(model) is None
    if fresh:
        inject(model, _config_for(model, adapter))
    try:
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
    layers = adapted_layers(model)
    _same_names("layer", adapter.layers(), layers)
    for name, layer in layers.items():
        scaling = adapter.scalings.get(name)
        if scaling is not None and not math.isclose(scaling, layer.lora_scaling):
            raise LoRAError(
                f"adapter: layer {name!r} was trained with a scaling (lora_alpha over r) of {scaling:g}, but the model "
                f"was injected with {layer.lora_scaling:g}; use the adapter's own options."
            )
    _same_kinds(model, adapter)
    live = {name: tensor for name, tensor, _ in named_state(model)}
    wanted = [name for name in adapter_keys(model) if adapter.complete or isinstance(live[name], nn.Parameter)]
    _same_names("tensor", [n for n in adapter.tensors if n not in live or n in wanted], wanted)
    for name, value in adapter.tensors.items():
        _check_tensor(name, value, live[name])


def _other_options(model: nn.Module, adapter: Adapter) -> str:
    """Which options the adapter has and the model has not, for an error that they explain."""
    ours = require_injection(model, "adapter")[2].config
    theirs = adapter.config or ours
    values = ((name, getattr(theirs, name), getattr(ours, name)) for name in theirs.differing(ours))
    differing = "; ".join(f"{name} was {before!r}, now {now!r}" for name, before, now in values)
    return f" The options differ: {differing}." if differing else ""


def _same_kinds(model: nn.Module, adapter: Adapter) -> None:
    """A square weight fits a layer that stores its transpose too; the adapter would act on the wrong side."""
    kinds = kinds_of(model)
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
    if value.is_floating_point() and isinstance(live, nn.Parameter) and not torch.isfinite(value.double()).all():
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


def placed_on(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter under the one prefix at which its layers are modules of the model."""
    modules = {canonical(name) for name, _ in model.named_modules(remove_duplicate=False)}
    return placed(adapter, modules, type(model).__name__)


def _config_for(model: nn.Module, adapter: Adapter) -> LoRAConfig:
    """The adapter's options; where they choose other layers under this prefix, the same with the layers spelled out."""
    config = adapter.config
    layers = adapter.layers()
    if config is None:
        raise LoRAError(without_options(adapter))
    targets = Targets(model, config)
    ranks = {name: adapter.tensors[f"{name}.{B}"].shape[1] for name in layers}
    same = all(config.rank(n) == ranks[n] and math.isclose(config.scaling(n), s) for n, s in adapter.scalings.items())
    if same and not targets.unmatched and set(targets.layers) == set(layers):
        return config
    return replace(config, **spelled_out(adapter, ranks))


def note_trained(model: nn.Module, adapter: Adapter) -> None:
    """What another callback had unfrozen in the saved run counts as trained here too; call before loading it."""
    prefix, root, injection = require_injection(model, "adapter")
    path = f"{prefix}." if prefix else ""
    for name, parameter in base_parameters(root).items():
        if path + name in adapter.tensors and name not in injection.trained:
            injection.trained.add(name)
            injection.initial[name] = parameter.detach().clone()


def _copy(model: nn.Module, adapter: Adapter) -> None:
    """Into the live tensors, all of them or none: everything was checked before."""
    before = is_merged(model)
    if before:
        unmerge(model)
    note_trained(model, adapter)
    live = {name: (tensor, owner) for name, tensor, owner in named_state(model)}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in adapter.tensors.items():
            tensor, owner = live[name]
            if tensor is None:
                owner.set_extra_state(value)
            else:
                tensor.copy_(value)
    note_trainable(model, expected=True)
    if before:
        merge(model)
