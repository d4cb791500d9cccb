"""inject, unload and their kin: adapters into a model in place, and out again without a trace."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .base import HALF, A, LoRALayer, strip_, uncompiled
from .config import LoRAConfig
from .errors import LoRAError
from .injection import (
    ATTRIBUTE,
    Injection,
    base_parameters,
    call_previous,
    find_injection,
    note_initial,
    note_trainable,
    patch,
    require_injection,
    swap_initial_,
    unpatch,
)
from .layers import LoRALinear, adapt_, init_factors_, layer_kind
from .loading import accept_partial_states, accept_whole_states_only
from .merge import adapted_layers, is_merged, merge, unmerge
from .readers import set_fast_paths_, swap_readers_
from .state import refuse_unmergeable
from .targets import Targets, entries_of, entry_name, names_match, refuse_unmatched, tied_weights

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

log = logging.getLogger(__name__)


def inject(model: nn.Module, config: LoRAConfig, *, merge_weights: bool = False) -> list[str]:
    """Adapt the layers that the config names, in place, and freeze everything else.

    Module tree, parameter names, objects and storage stay; lora_A and lora_B are added to each adapted layer. The
    same call again changes nothing. The user's random stream is not advanced.

    Args:
        model: any module; layers inside it are adapted.
        config: the options.
        merge_weights: loralib's habit: model.eval() merges, model.train() unmerges.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: an entry names nothing, a layer cannot be adapted, or the model was injected with other options.
            The model is then as it was.
    """
    model = uncompiled(model)
    found = find_injection(model)
    if found is None:
        begin_injection(model, config, merge_weights=merge_weights)
        finish_injection(model)
    else:
        _refuse_other(found, model, config, merge_weights)
    return list(adapted_layers(model))


def begin_injection(model: nn.Module, config: LoRAConfig, *, merge_weights: bool = False) -> None:
    """Adapt the layers that exist now. Later ones can follow; finish_injection judges what names nothing."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise LoRAError(f"inject: {type(model).__name__} already has PEFT adapters; merge or unload them first.")
    setattr(model, ATTRIBUTE, Injection(config, merge_weights))
    with _leaving_no_trace(model):
        adapt_new_layers(model)
        note_initial(model)
        if merge_weights:
            patch(model, "train", _merge_by_mode)


def finish_injection(model: nn.Module) -> None:
    """Judge the entries of every option, now that all layers are there.

    Raises:
        LoRAError: an entry names nothing. The adapters are then taken out.
    """
    _, root, injection = require_injection(model, "inject")
    with _leaving_no_trace(root):
        targets = Targets(root, injection.config)
        refuse_unmatched(root, targets.unmatched)
    for name, reason in targets.left_out.items():
        log.info("lightning_lora: %s is left out of 'all-linear': %s", name, reason)


def adapt_new_layers(model: nn.Module) -> None:
    """Adapt what the config names and is not adapted yet, freeze what is new."""
    _, root, injection = require_injection(model, "inject")
    targets = Targets(root, injection.config)
    new = {name: module for name, module in targets.layers.items() if not isinstance(module, LoRALayer)}
    for name, module in new.items():
        _check_supported(name, module, injection.config)
    _freeze(root, injection, new, targets.saved)
    tied = tied_weights(root)
    seed = hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()
    with torch.inference_mode(False):
        for name, module in new.items():
            layer = _adapt(name, module, injection.config, seed)
            layer.lora_tied = tied.get(layer, "")
    note_trainable(root, expected=True)
    swap_readers_(root)
    set_fast_paths_(root)
    accept_partial_states(root)


def unload(model: nn.Module) -> None:
    """Take the adapters out without merging.

    Classes, names, values (of trained biases, modules_to_save and buffers too), parameter identity and requires_grad
    are as before injection.

    Raises:
        LoRAError: the model was not injected.
    """
    _, root, injection = require_injection(model, "unload")
    if is_merged(root):
        unmerge(root)
    swap_initial_(root, injection.initial)
    _strip(model, root, injection)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Plain modules with merged weights and no trace of LoRA; returns the model.

    Raises:
        LoRAError: the model was not injected, W' is not finite, or a layer cannot be merged because its weight has
            another owner. The model is then unmerged.
    """
    _, root, injection = require_injection(model, "merge_and_unload")
    before = is_merged(root)
    merge(root)
    try:
        refuse_unmergeable(root)
    except LoRAError:
        if not before:
            unmerge(root)
        raise
    for layer in adapted_layers(root).values():
        layer.lora_kept = {}
    _strip(model, root, injection)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before injection inside, in whatever state it was found outside.

    Trained biases, modules_to_save and persistent buffers have their initial values inside.
    """
    _, root, injection = require_injection(model, "disable_adapter")
    layers = adapted_layers(root)
    before = is_merged(root)
    if before:
        unmerge(root)
    active = {name: layer.lora_active for name, layer in layers.items()}
    trained = swap_initial_(root, injection.initial)
    _set_active(root, layers, dict.fromkeys(layers, False))
    try:
        yield model
    finally:
        if is_merged(root):
            unmerge(root)
        _set_active(root, layers, active)
        swap_initial_(root, trained)
        if before:
            merge(root)


def _set_active(root: nn.Module, layers: Mapping[str, LoRALayer], active: Mapping[str, bool]) -> None:
    for name, layer in layers.items():
        layer.lora_active = active[name]
    set_fast_paths_(root)


def _refuse_other(
    found: tuple[str, nn.Module, Injection], model: nn.Module, config: LoRAConfig, merge_weights: bool
) -> None:
    name, root, injection = found
    differing = injection.config.differing(config)
    if root is not model:
        raise LoRAError(f"inject: {name!r} inside {type(model).__name__} was injected already; unload it first.")
    if differing:
        options = ", ".join(
            f"{option} was {getattr(injection.config, option)!r}, now {getattr(config, option)!r}"
            for option in differing
        )
        raise LoRAError(f"inject: {type(model).__name__} was injected with other options ({options}); unload it first.")
    if merge_weights != injection.merge_weights:
        raise LoRAError(f"inject: {type(model).__name__} was injected with merge_weights={injection.merge_weights}.")


@contextmanager
def _leaving_no_trace(root: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _strip(root, root, vars(root)[ATTRIBUTE])
        raise


def _strip(model: nn.Module, root: nn.Module, injection: Injection) -> None:
    for layer in adapted_layers(root).values():
        strip_(layer)
    swap_readers_(root)
    set_fast_paths_(root)
    for name, parameter in base_parameters(root).items():
        parameter.requires_grad_(injection.requires_grad.get(name, parameter.requires_grad))
    accept_whole_states_only(root)
    unpatch(model)
    delattr(root, ATTRIBUTE)


def _check_supported(name: str, module: nn.Module, config: LoRAConfig) -> None:
    kind = type(module).__name__
    problem = ""
    if layer_kind(module) is None:
        inside = [child for child, m in module.named_modules() if child and layer_kind(m)]
        problem = f"a {kind} cannot be adapted" + (f"; name the layers inside it, as {inside[0]!r}" if inside else "")
    elif hasattr(module, A):
        problem = f"the {kind} has a lora_A of another library; take that out first"
    elif "forward" in vars(module):
        problem = f"its forward is replaced on the instance of {kind}, which would pass over the adapter; undo that"
    else:
        problem = _weight_problem(module)
    enabled = _enabled(name, config)
    if not problem and enabled is not None:
        if not issubclass(layer_kind(module) or nn.Module, LoRALinear):
            problem = f"enable_lora needs a linear layer, not a {kind}"
        elif _outputs(module) % len(enabled):
            problem = f"enable_lora has {len(enabled)} parts, which do not divide its {_outputs(module)} outputs"
    if problem:
        raise LoRAError(f"inject: {name!r}: {problem}, or leave it out with exclude_modules=[{name!r}].")


def _weight_problem(module: nn.Module) -> str:
    kind = type(module).__name__
    names = ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",)
    weights = [module._parameters[name] for name in names if module._parameters.get(name) is not None]
    if is_parametrized(module) or not weights:
        return f"the weight of the {kind} is computed from others (weight_norm, parametrize); remove that first"
    for weight in weights:
        if isinstance(weight, UninitializedParameter):
            return f"the {kind} has no shape yet; run one batch through the model first"
        if weight is not None and weight.dtype not in (*HALF, torch.float32, torch.float64):
            return f"its weight is {weight.dtype}; adapters need float16, bfloat16, float32 or float64"
    return ""


def _outputs(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return 3 * int(module.embed_dim)
    rows, cols = cast(torch.Tensor, module.weight).shape
    return int(rows if isinstance(module, nn.Linear) else cols)


def _enabled(name: str, config: LoRAConfig) -> tuple[bool, ...] | None:
    for entry in entries_of(config.enable_lora):
        if names_match(entry, name):
            return tuple((config.enable_lora or {})[entry_name(entry)])
    return None


def _adapt(name: str, module: nn.Module, config: LoRAConfig, seed: str) -> LoRALayer:
    layer = adapt_(
        module,
        r=config.rank(name),
        alpha=config.alpha(name),
        scaling=config.scaling(name),
        dropout=config.lora_dropout,
        enabled=_enabled(name, config),
        wide=config.autocast_adapter_dtype,
    )
    dtype = layer.main_weight().dtype
    dtype = torch.float32 if dtype in HALF and config.autocast_adapter_dtype else dtype
    digest = hashlib.sha256(f"{seed}{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    init_factors_(layer, config.init_lora_weights, dtype, generator)
    return layer


def _freeze(
    root: nn.Module, injection: Injection, new: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> None:
    trainable = {id(parameter) for module in saved.values() for parameter in module.parameters()}
    if injection.config.bias == "lora_only":
        trainable |= {id(module.bias) for module in new.values() if getattr(module, "bias", None) is not None}
    for name, parameter in base_parameters(root).items():
        if name in injection.requires_grad:
            continue
        injection.requires_grad[name] = parameter.requires_grad
        everywhere = injection.config.bias == "all" and name.rpartition(".")[2].endswith("bias")
        parameter.requires_grad_(parameter.is_floating_point() and (everywhere or id(parameter) in trainable))


def _merge_by_mode(module: nn.Module, previous: Callable[..., Any] | None, mode: bool = True) -> nn.Module:
    """The patched train(): decided at the root, so that merging stays all or nothing."""
    call_previous(module, previous, "train", mode)
    (unmerge if mode else merge)(module)
    return module
