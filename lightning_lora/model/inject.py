"""inject, unload, merge_and_unload, disable_adapter: put adapters into a model, in place, and take them out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..arguments import names_near_misses
from ..config import LoRAConfig, PeftConfig, as_config, is_config
from ..distributed.sharding import is_sharded, refuse_fully_sharded
from ..errors import LoRAError, sentence
from ..names import ALL_LINEAR, ATTRIBUTE, canonical, listed
from ..nn.fast_paths import update_fast_paths
from ..nn.gradient_checkpointing import disable_input_require_grads, enable_input_require_grads
from ..nn.layer_kinds import adapt_
from ..nn.lora_layer import AdaptedWeights, LayerSpec, LoRALayer, adapted_layers, adapted_places
from ..nn.low_rank import HALF
from ..nn.parameter import adapt_parameter_
from ..nn.quantised import allow_packing_, keep_gradients_
from ..nn.readers import patch_readers
from ..nn.tied_weights import record_ties
from ..nn.token_rows import LoRATable, TrainedRows, adapt_table_, share_table_, table_adapters
from ..nn.variant import variant_of
from ..nn.writer import Turn
from ..notices import tell
from ..progress import progress_bar
from .base_values import put_base_values_, take_back_base_values_
from .dequantize import dequantize_dtype, plain_weights, replace_quantised_
from .gradients import note_gradient
from .injection import (
    ALL_OPTIONS,
    Injected,
    Injection,
    find_injection,
    record_trainable,
    refuse_replaced_layers,
    require_injection,
    snapshot_initial,
)
from .large_adapters import describe_large_adapters
from .merging import FoundState, is_merged, merge, unmerge
from .named_state import base_parameters, exchange_values_, named_state
from .passed_over import describe_passed_over, warn_of_passed_over
from .patches import call_previous, patch, unpatch
from .pretrained import (
    follow_gradient_checkpointing,
    forget_quantisation,
    resized_embeddings,
    warn_before_save_pretrained,
)
from .state_dict import accept_partial_states, accept_whole_states_only, refuse_unmergeable
from .targets import (
    TRAINED_WHOLE,
    Targets,
    check_parameter,
    check_shapes,
    check_supported,
    check_table,
    check_trainable,
    check_unadapted,
    check_untied,
)
from .undisturbed import Ending
from .wrappers import unwrapped, warn_of_late_adapters

IN_CONFIG = {
    field.name: f"say it in the config: inject(model, LoRAConfig({field.name}=...))" for field in fields(LoRAConfig)
}


@names_near_misses("inject", IN_CONFIG)
def inject(
    model: nn.Module, config: LoRAConfig | PeftConfig, *, merge_weights: bool = False, seed: int | None = None
) -> list[str]:
    """Adapt the layers that the config names, in place, and freeze everything else.

    Module tree, parameter names, objects and storage stay; lora_A and lora_B are added to each adapted layer. The
    same call again changes nothing. The user's random stream is not advanced.

    Args:
        model: any module; layers inside it are adapted.
        config: the options; also a peft.LoraConfig, see LoRAConfig.from_peft.
        merge_weights: whether model.eval() merges and model.train() unmerges, as in loralib.
        seed: what the adapters are drawn from. Without one they come from the state of torch's random stream, which is
            not advanced: two injections in a row draw the same adapters, and a resumed run those of the first.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: an entry names nothing, a layer cannot be adapted, or the model was injected with other options or
            another seed. The model is then as it was.
    """
    if not is_config(config):
        hint = "; LoRAConfig(**options) takes a dictionary" if isinstance(config, Mapping) else ""
        raise LoRAError(f"inject: expected a LoRAConfig or a peft.LoraConfig, found {type(config).__name__}{hint}.")
    wrapped, model, config = model, unwrapped(model, "inject"), as_config(config)
    earlier = find_injection(model)
    if earlier is not None and earlier.root is model and not earlier.record.validated:
        with Turn("inject", [earlier.record.writer]):
            strip_adapters(model)  # a callback's, made before configure_model, which injects by itself
        earlier = None
    if earlier is None:
        warn_of_late_adapters(wrapped, "inject")
        record = Injection(config, merge_weights, seed="" if seed is None else fixed_seed(seed))
        _inject(model, record)
        _tell_of_targets(record)
    else:
        _refuse_other(earlier, model, config, merge_weights, seed)
    layers = adapted_layers(model)
    large = describe_large_adapters(layers) if earlier is None else ""
    if large:
        tell(f"lightning_lora: {large}")
    return list(layers)


def inject_to_load(model: nn.Module, config: LoRAConfig, scope: str = "") -> None:
    """Adapt a model that was not injected for an adapter whose values are loaded next. In place.

    Nothing is computed from the weights for what A and B start from, which can take minutes.

    Args:
        model: the model.
        config: the adapter's options.
        scope: the prefix of the part of the model that the adapter is for, outside of which nothing is trained.
    """
    record = Injection(config, scope=scope, values_follow=True)
    _inject(model, record)
    record.values_follow = record.passes_over_nearly_all = False  # whoever trained the adapter has chosen its layers


def unload(model: nn.Module) -> None:
    """Take the adapters out without merging. In place.

    Classes, names, values (of trained biases, modules_to_save and buffers too), parameter identity and requires_grad
    are as before injection.

    Raises:
        LoRAError: the model was not injected.
    """
    model = unwrapped(model, "unload")
    root, record, *_ = require_injection(model, "unload")
    refuse_fully_sharded(root, "unload")
    with Turn("unload", [record.writer]):
        if is_merged(root):
            unmerge(root)
        take_back_base_values_(root)
        exchange_values_(root, record.initial)
        strip_adapters(root)
        unpatch(root)
        unpatch(model)


def merge_and_unload(model: nn.Module, *, dequantize: torch.dtype | str | None = None) -> nn.Module:
    """Merge the adapters and leave plain modules without a trace of LoRA; return the model. In place.

    Args:
        model: an injected model.
        dequantize: the dtype of plain weights in place of quantised ones, adapted or not: those of bitsandbytes are
            replaced by nn.Linear, and a transformers model forgets how it was quantised.

    Raises:
        LoRAError: the model was not injected, a layer was replaced since, W' is not finite, or a layer cannot be
            merged because its weight has another owner, or is quantised and `dequantize` is not given.
    """
    dtype = dequantize_dtype(dequantize, "merge_and_unload")
    root, record, *_ = require_injection(unwrapped(model, "merge_and_unload"), "merge_and_unload")
    refuse_replaced_layers(root, "merge_and_unload")
    refuse_fully_sharded(root, "merge_and_unload")
    with Turn("merge_and_unload", [record.writer]):
        if record.writer.is_at("disable_adapter"):
            raise LoRAError(
                "merge_and_unload: the adapters are disabled, inside `with disable_adapter(model)`; call it after that "
                "block, or unload(model) for the base."
            )
        refuse_unmergeable(root, dtype)
        unmerge(root)  # what stayed factored, and need not any more, is merged now
        plain = plain_weights(root, dtype) if dtype is not None else {}
        merge(root)
        for layer in adapted_layers(root).values():
            layer.lora.records.clear()
        strip_adapters(root)
        if plain:
            replace_quantised_(root, plain)
            forget_quantisation(root)
        unpatch(root)
        unpatch(model)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Let the model be as it was before injection inside, and as it was found outside.

    Trained biases, modules_to_save and persistent buffers have their initial values inside, which no gradient reaches.
    Nothing is written into the trained ones: a backward of an earlier forward goes on, also inside. State dicts and
    what is saved hold the trained values, and what is loaded inside is there outside; unload takes all of it out.
    """
    root, record, *_ = require_injection(unwrapped(model, "disable_adapter"), "disable_adapter")
    layers = adapted_layers(root).values()
    with Turn("disable_adapter", [record.writer]) as turn:
        found = FoundState(root, layers)
        were_active = {layer: layer.lora_active or layer.lora.merged for layer in layers}
        is_inside = record.writer.is_at("disable_adapter", before=turn)

        def bring_back() -> None:
            if vars(root).get(ATTRIBUTE) is not record:
                return  # it was unloaded inside
            if is_merged(root):
                unmerge(root)
            _set_active(root, were_active)
            reached = [] if is_inside else take_back_base_values_(root)
            found.bring_back()
            if reached:
                raise LoRAError(
                    f"disable_adapter: a backward inside reached {reached[0]!r}, which is sharded and had its values "
                    "from before training: the gradients are wrong. Run the backward after the block."
                )

        end = Ending(turn, bring_back)
        try:
            try:
                if found.merged:
                    unmerge(root)
                put_base_values_(named_state(root), record.initial)
                _set_active(root, dict.fromkeys(were_active, False))
                yield model
            finally:
                end()
        finally:
            end()


def _inject(model: nn.Module, record: Injection) -> None:
    with Turn("inject", [record.writer]):
        _begin(model, record)
        finish_injection(model)


def _tell_of_targets(record: Injection) -> None:
    """Tell, after an injection without a Trainer, what its summary would."""
    reasons: dict[str, list[str]] = {}
    for name, reason in record.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        are = "is" if len(names) == 1 else "are"
        tell(f"lightning_lora: {listed(names)} {are} left out of 'all-linear': {reason}.")
    if record.passes_over_nearly_all:
        warn_of_passed_over(record)
    elif record.passed_over:
        tell(f"lightning_lora: 'all-linear' passes over {record.passed_over}")


def begin_injection(
    model: nn.Module, config: LoRAConfig, *, seed: str = "", given: frozenset[str] = ALL_OPTIONS
) -> None:
    """Adapt the layers that exist now; adapt_new_layers adds later ones, finish_injection checks the options' names.

    Adapters are drawn from `seed`, or from the random stream's state when each layer is adapted. `given` names the
    options that the user gave. In place.
    """
    record = Injection(config, seed=seed, given=given)
    with Turn("inject", [record.writer]):
        _begin(model, record)


def _begin(model: nn.Module, record: Injection) -> None:
    check_unadapted(model)
    record.begin(model)
    with _leaving_no_trace(model):
        adapt_new_layers(model)
        snapshot_initial(model)
        if record.merge_weights:
            patch(model, "train", _merge_by_mode)


def finish_injection(model: nn.Module) -> None:
    """Check that each entry of the options names something, now that all layers are there.

    Raises:
        LoRAError: an entry names nothing. The adapters are then taken out.
    """
    root, record, *_ = require_injection(model, "inject")
    with Turn("inject", [record.writer]), _leaving_no_trace(root):
        targets = Targets(root, record.config, record.scope)
        if any(targets.unmatched.values()):
            sentences = "\n".join(map(sentence, targets.unmatched))
            raise LoRAError(f"inject: {type(root).__name__}: {sentences}")
    if not record.validated:
        for unmatched in targets.unmatched:
            warnings.warn(f"lightning_lora: {unmatched}; it is passed over.", stacklevel=3)
        record.left_out = targets.left_out
        for name in targets.saved_instead:
            tell(f"lightning_lora: {name} {TRAINED_WHOLE}")
        if record.config.target_modules == ALL_LINEAR:
            record.passed_over, record.passes_over_nearly_all = describe_passed_over(root, record, targets.saved)
    record.validated = True


def adapt_new_layers(model: nn.Module) -> None:
    """Adapt the layers that the config names and that are not adapted yet, and freeze what is new. In place."""
    root, record, *_ = require_injection(model, "inject")
    with Turn("inject", [record.writer]):
        _adapt_new_layers(root, record)


def _adapt_new_layers(root: nn.Module, record: Injection) -> None:
    check_shapes(root)
    targets = Targets(root, record.config, record.scope)
    new = {name: module for name, module in targets.layers.items() if not isinstance(module, LoRALayer)}
    for name, module in new.items():
        check_supported(name, module, record.config)
    live = adapted_layers(root)
    parameters = {name: place for name, place in targets.parameters.items() if name not in live}
    for name, (module, leaf) in parameters.items():
        check_parameter(name, module, leaf, is_layer=module in targets.layers.values())
    check_trainable(targets.saved)
    modules = {canonical(name): module for name, module in root.named_modules()}
    tables = {name: rows for name, rows in targets.tables.items() if not isinstance(modules[name], LoRATable)}
    for name in tables:
        check_table(name, modules[name], targets)
    if not record.config.ensure_weight_tying:
        check_untied(root, targets.saved)
    _freeze(root, record, new, targets.saved)
    seed = record.seed or random_seed()
    with torch.inference_mode(False), progress_bar("drawing adapters", len(new) + len(parameters)) as advance:
        for name, module in new.items():
            note_gradient(_with_factors(adapt_(module, name, _spec(name, record, seed), record)))
            advance(1)
        for name, (module, leaf) in parameters.items():
            note_gradient(_with_factors(adapt_parameter_(module, leaf, name, _spec(name, record, seed), record)))
            advance(1)
        for name, rows in tables.items():
            _adapt_table(root, name, modules[name], rows, record)
    record.layers = [name for name, _, _ in adapted_places(root)]
    record_ties(root)
    record_trainable(root, expected=True)
    _record_resized(root, record)
    keep_gradients_(root)
    patch_readers(root)
    update_fast_paths(root)
    enable_input_require_grads(root)
    follow_gradient_checkpointing(root)
    accept_partial_states(root)
    warn_before_save_pretrained(root)


def strip_adapters(root: nn.Module) -> None:
    """Take the adapters out, but leave patched methods. In place."""
    record: Injection = vars(root)[ATTRIBUTE]
    allow_packing_(root)
    for layer in adapted_layers(root).values():
        with layer.lora.lock:  # not while W + delta stands in for the weight in another thread's forward
            layer.strip_()
    patch_readers(root)
    update_fast_paths(root)
    for name, parameter in base_parameters(root).items():
        if name in record.requires_grad:
            parameter.requires_grad_(record.requires_grad[name])
    disable_input_require_grads(root)
    accept_whole_states_only(root)
    delattr(root, ATTRIBUTE)


def fixed_seed(seed: int, verb: str = "inject") -> str:
    """Return a user's seed as the text that adapters are drawn from.

    Raises:
        LoRAError: it is not a whole number; the message begins with the verb.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise LoRAError(f"{verb}: seed must be a whole number, but it is {seed!r}.")
    return f"seed {seed}:"


def random_seed() -> str:
    """Return a text that tells the state of torch's random stream, without advancing it."""
    return hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()


def _refuse_other(
    earlier: Injected, model: nn.Module, config: LoRAConfig, merge_weights: bool, seed: int | None
) -> None:
    record, differences = earlier.record, earlier.record.config.differences(config)
    if earlier.root is not model:
        where = earlier.prefix.removesuffix(".") or earlier.inside.removesuffix(".")
        raise LoRAError(f"inject: {where!r} inside {type(model).__name__} was injected already; unload it first.")
    if differences:
        options = ", ".join(differences)
        raise LoRAError(f"inject: {type(model).__name__} was injected with other options ({options}); unload it first.")
    if merge_weights != record.merge_weights:
        raise LoRAError(
            f"inject: {type(model).__name__} was injected with merge_weights={record.merge_weights}; unload it first."
        )
    if seed is not None and fixed_seed(seed) != record.seed:
        raise LoRAError(f"inject: {type(model).__name__} was injected with another seed; unload it first.")


def _record_resized(root: nn.Module, record: Injection) -> None:
    """Let resized embeddings belong to the adapter, as in PEFT: their new rows are others in each program."""
    resized = {id(weight) for weight in resized_embeddings(root) if not weight.is_meta}
    for name, parameter in base_parameters(root).items():
        if id(parameter) in resized and name not in record.trained:
            record.trained.add(name)
            record.unfrozen.add(name)
            record.initial[name] = parameter.detach().clone()
            record.resized.add(name)
            tell(f"lightning_lora: {name} was resized to {len(parameter)} rows: saved with the adapter.")


def _set_active(root: nn.Module, active: Mapping[AdaptedWeights, bool]) -> None:
    for layer, is_active in active.items():
        layer.lora_active = is_active
    update_fast_paths(root)


@contextmanager
def _leaving_no_trace(root: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        strip_adapters(root)
        unpatch(root)
        raise


def _freeze(root: nn.Module, record: Injection, new: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    trainable = {id(parameter) for module in saved.values() for parameter in module.parameters()}
    if record.config.bias == "lora_only":
        trainable |= {id(module.bias) for module in new.values() if getattr(module, "bias", None) is not None}
    for name, parameter in base_parameters(root).items():
        rebuilt = new or is_sharded(parameter)  # then what was frozen may not be frozen any more
        if name in record.requires_grad and (not rebuilt or name in record.trained):
            continue
        record.requires_grad.setdefault(name, parameter.requires_grad)
        is_bias = name.rpartition(".")[2] == "bias" and name.startswith(record.scope)  # PEFT's rule: no in_proj_bias
        everywhere = record.config.bias == "all" and is_bias
        parameter.requires_grad_(parameter.is_floating_point() and (everywhere or id(parameter) in trainable))


def _spec(name: str, record: Injection, seed: str) -> LayerSpec:
    config = record.config
    digest = hashlib.sha256(f"{seed}{name}".encode()).digest()
    return LayerSpec(
        r=config.rank(name),
        alpha=config.alpha(name),
        scaling=config.scaling(name),
        dropout=config.lora_dropout,
        enabled=config.enabled_parts(name),
        keep_float32=config.autocast_adapter_dtype,
        init=config.init_lora_weights,
        variant=variant_of(config),
        start=config.has_start,
        seed=int.from_bytes(digest[:8], "big") >> 1,
    )


def _adapt_table(root: nn.Module, name: str, module: nn.Module, rows: tuple[int, ...], record: Injection) -> None:
    """Train rows of a table, the same ones as those of the table that it is tied to."""
    tied = table_adapters(root).get(id(module.weight))
    if tied is not None:
        share_table_(module, tied)
        return
    keep_float32 = record.config.autocast_adapter_dtype
    spec = LayerSpec(
        r=len(rows), alpha=len(rows), scaling=1.0, variant=TrainedRows(), keep_float32=keep_float32, rows=rows
    )
    note_gradient(_with_factors(adapt_table_(module, name, spec, record)))


def _with_factors(layer: AdaptedWeights) -> AdaptedWeights:
    dtype = layer.weight_dtype()
    layer.create_factors(torch.float32 if dtype in HALF and layer.lora.spec.keep_float32 else dtype)
    return layer


def _merge_by_mode(module: nn.Module, previous: Callable[..., Any] | None, mode: bool = True) -> nn.Module:
    """train() of an injected module with merge_weights: called at the root, so that all layers merge or none."""
    call_previous(module, previous, "train", mode)
    (unmerge if mode else merge)(module)
    return module
