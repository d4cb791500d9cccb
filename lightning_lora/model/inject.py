"""inject, unload and their kin: adapters into a model in place, and out again without a trace."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import is_sharded, refuse_fully_sharded
from ..errors import LoRAError
from ..names import ATTRIBUTE, uncompiled
from ..nn.attention import swap_readers_
from ..nn.fast_paths import set_fast_paths_
from ..nn.gradient_checkpointing import let_gradients_in_, let_gradients_in_no_more_
from ..nn.layer_kinds import adapt_
from ..nn.lora_layer import LoRALayer, adapted_layers, strip_
from ..nn.low_rank import HALF
from ..nn.tied_weights import note_tied
from .injection import Injection, find_injection, note_initial, note_trainable, require_injection
from .merging import is_merged, merge, unmerge
from .named_state import base_parameters, swap_initial_
from .patches import call_previous, patch, unpatch
from .state_dict import accept_partial_states, accept_whole_states_only, refuse_unmergeable
from .targets import Targets, check_shapes, check_supported, check_unadapted, refuse_unmatched


def summary(model: nn.Module) -> str:
    """One line: adapted layers, trainable of total parameters, adapter size."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers)
    return (
        f"LoRA: {len(layers)} adapted layers, {trainable:,} of {total:,} parameters trainable "
        f"({trainable / max(total, 1):.2%}), adapter {size / 1e6:.3g} MB"
    )


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
    if found is not None and found[1] is model and not found[2].judged:
        withdraw(model)  # a callback's, made before configure_model, which injects by itself
        found = None
    if found is None:
        begin_injection(model, config, merge_weights=merge_weights)
        finish_injection(model)
    else:
        _refuse_other(found, model, config, merge_weights)
    return list(adapted_layers(model))


def random_seed() -> str:
    """What the user's random stream would give next, without advancing it."""
    return hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()


def begin_injection(model: nn.Module, config: LoRAConfig, *, merge_weights: bool = False, seed: str = "") -> None:
    """Adapt the layers that exist now. Later ones can follow; finish_injection judges what names nothing.

    Adapters are drawn from `seed`, or from the random stream's state when each layer is adapted.
    """
    check_unadapted(model)
    setattr(model, ATTRIBUTE, Injection(config, merge_weights, seed=seed))
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
    for name, reason in {} if injection.judged else targets.left_out.items():
        log.info("lightning_lora: %s is left out of 'all-linear': %s", name, reason)
    injection.judged = True


def adapt_new_layers(model: nn.Module) -> None:
    """Adapt what the config names and is not adapted yet, freeze what is new."""
    _, root, injection = require_injection(model, "inject")
    check_shapes(root)
    targets = Targets(root, injection.config)
    new = {name: module for name, module in targets.layers.items() if not isinstance(module, LoRALayer)}
    for name, module in new.items():
        check_supported(name, module, injection.config)
    _freeze(root, injection, new, targets.saved)
    seed = injection.seed or random_seed()
    with torch.inference_mode(False):
        for name, module in new.items():
            _adapt(name, module, injection.config, seed)
    note_tied(root)
    note_trainable(root, expected=True)
    swap_readers_(root)
    set_fast_paths_(root)
    let_gradients_in_(root)
    accept_partial_states(root)


def unload(model: nn.Module) -> None:
    """Take the adapters out without merging.

    Classes, names, values (of trained biases, modules_to_save and buffers too), parameter identity and requires_grad
    are as before injection.

    Raises:
        LoRAError: the model was not injected.
    """
    _, root, injection = require_injection(model, "unload")
    refuse_fully_sharded(root, "unload")
    if is_merged(root):
        unmerge(root)
    swap_initial_(root, injection.initial)
    _strip(model, root)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Plain modules with merged weights and no trace of LoRA; returns the model.

    Raises:
        LoRAError: the model was not injected, W' is not finite, or a layer cannot be merged because its weight has
            another owner.
    """
    _, root, _ = require_injection(model, "merge_and_unload")
    refuse_fully_sharded(root, "merge_and_unload")
    refuse_unmergeable(root)
    unmerge(root)  # what stayed factored, and need not any more, is merged now
    merge(root)
    for layer in adapted_layers(root).values():
        layer.lora_kept = {}
    _strip(model, root)
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
        _strip(root, root)
        raise


def _strip(model: nn.Module, root: nn.Module) -> None:
    withdraw(root)
    unpatch(model)


def withdraw(root: nn.Module) -> None:
    """Take the adapters out, but leave what is patched."""
    injection: Injection = vars(root)[ATTRIBUTE]
    for layer in adapted_layers(root).values():
        strip_(layer)
    swap_readers_(root)
    set_fast_paths_(root)
    for name, parameter in base_parameters(root).items():
        if name in injection.requires_grad:
            parameter.requires_grad_(injection.requires_grad[name])
    let_gradients_in_no_more_(root)
    accept_whole_states_only(root)
    delattr(root, ATTRIBUTE)


def _adapt(name: str, module: nn.Module, config: LoRAConfig, seed: str) -> None:
    layer = adapt_(
        module,
        r=config.rank(name),
        alpha=config.alpha(name),
        scaling=config.scaling(name),
        dropout=config.lora_dropout,
        enabled=config.enabled_parts(name),
        wide=config.autocast_adapter_dtype,
    )
    dtype = layer.main_weight().dtype
    dtype = torch.float32 if dtype in HALF and config.autocast_adapter_dtype else dtype
    digest = hashlib.sha256(f"{seed}{name}".encode()).digest()
    layer.lora_init = (config.init_lora_weights, int.from_bytes(digest[:8], "big") >> 1)
    layer.create_factors(dtype)


def _freeze(
    root: nn.Module, injection: Injection, new: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> None:
    trainable = {id(parameter) for module in saved.values() for parameter in module.parameters()}
    if injection.config.bias == "lora_only":
        trainable |= {id(module.bias) for module in new.values() if getattr(module, "bias", None) is not None}
    for name, parameter in base_parameters(root).items():
        settled = not new and not is_sharded(parameter)
        if name in injection.requires_grad and (settled or name in injection.trained):
            continue  # where a layer was built anew, or made parallel, its parameters may not be frozen
        injection.requires_grad.setdefault(name, parameter.requires_grad)
        everywhere = injection.config.bias == "all" and name.rpartition(".")[2].endswith("bias")
        parameter.requires_grad_(parameter.is_floating_point() and (everywhere or id(parameter) in trainable))


def _merge_by_mode(module: nn.Module, previous: Callable[..., Any] | None, mode: bool = True) -> nn.Module:
    """The patched train(): decided at the root, so that merging stays all or nothing."""
    call_previous(module, previous, "train", mode)
    (unmerge if mode else merge)(module)
    return module
