"""inject, unload, merge_and_unload, disable_adapter: put adapters into a model, in place, and take them out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..config import LoRAConfig, PeftConfig, as_config, is_config, plain_number
from ..distributed.sharding import is_sharded, refuse_fully_sharded
from ..errors import LoRAError, sentence
from ..names import listed
from ..nn.adapted_module import AdaptedModule, adapted_layers, adapters_in, unadapt_
from ..nn.adapted_weights import AdaptedWeights, LayerSpec
from ..nn.claims import DISABLED, OFF, claimed
from ..nn.gradient_checkpointing import disable_input_require_grads
from ..nn.layer_kinds import adapt_
from ..nn.low_rank import HALF
from ..nn.parameter import adapt_parameter_
from ..nn.quantized import allow_packing_
from ..nn.readers import patch_readers, undo_readers, update_fast_paths
from ..nn.token_rows import LoRATable, TrainedRows, adapt_table_, share_table_, table_adapters
from ..nn.variant import variant_of
from ..notices import tell
from ..progress import progress_bar
from .adapted_model import AdaptedModel, Listing, find_adapted, open_model, with_lists
from .attached import find_attached_alone, keep_attached, record_and_patch_layers, take_over_attached
from .dequantize import dequantize_dtype, dequantized_weights, replace_quantized_
from .experts import option_for_experts
from .facts import begin_facts, end_facts, facts_of
from .initial_in_place import initial_values_of, put_in_, take_out_
from .initial_values import restore_initial_, snapshot_initial
from .injection import Chosen, Injection
from .load_state_dict import unhook_load_state_dict
from .merging import (
    FoundState,
    merge,
    merge_listed,
    run_block,
    unmerge,
    unmerge_if_merged,
    unmerge_listed,
)
from .named_state import state_of
from .patches import call_previous, patch, unpatch
from .pretrained import forget_quantization, resized_embeddings
from .reasons import check_shapes, check_trainable, check_unadapted
from .recorded_layers import refuse_replaced_layers
from .state_dict import refuse_unmergeable
from .targets import TRAINED_WHOLE, Selection, selected, warn_of_unused
from .transaction import transaction
from .wrappers import unwrapped, warn_of_late_adapters

StoredParameters = list[tuple[nn.Module, str, nn.Parameter]]  # each with its module and its name there


def inject(
    model: nn.Module, config: LoRAConfig | PeftConfig, *, merge_weights: bool = False, seed: int | None = None
) -> list[str]:
    """Adapt the layers that the config names, in place, and freeze everything else.

    The module tree, parameter names, parameter objects and their storage stay as they are. Each adapted layer gets
    lora_A and lora_B. The same call again changes nothing. The user's random stream is not advanced.

    Args:
        model: any module; layers inside it are adapted.
        config: the options; also a peft.LoraConfig, see LoRAConfig.from_peft.
        merge_weights: whether model.eval() merges and model.train() unmerges, as in loralib.
        seed: draw the adapters from this number. Without it they are drawn from the state of torch's random stream,
            which is not advanced: two injections in a row draw the same adapters, and so does a resumed run.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: an entry names nothing, a layer cannot be adapted, or the model was injected with other options or
            another seed. The model is then as it was.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inject(model, LoRAConfig(r=2, target_modules=["0"]))
        ['0']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    if not is_config(config):
        hint = "; LoRAConfig(**options) takes a dictionary" if isinstance(config, Mapping) else ""
        raise LoRAError(f"inject: expected a LoRAConfig or a peft.LoraConfig, found {type(config).__name__}{hint}.")
    wrapped, config = model, as_config(config)
    listing = Listing(unwrapped(model, "inject"))
    handle = find_adapted(listing)
    if handle is not None and handle.root is handle.model and "validated" not in handle.injection.marks:
        with claimed("inject", handle.injection.claims):
            strip_adapters(handle)  # the callback adapted the model before configure_model, which calls inject itself
        handle = None
    if handle is not None:
        _refuse_other(handle, config, merge_weights, seed)
        return list(handle.layers)
    warn_of_late_adapters(wrapped, "inject")
    injection = Injection(config, seed="" if seed is None else fixed_seed(seed))
    if merge_weights:
        injection.marks.add("merges by mode")
    handle = _inject(listing, injection)
    _tell_of_layers(handle)
    return list(handle.layers)


def inject_layers(listing: Listing, injection: Injection) -> AdaptedModel:
    """Adapt exactly the layers of an adapter whose values are loaded next. In place. No option selects anything.

    Initial values of A and B are not computed from the weights, which can take minutes.

    Args:
        listing: of the model.
        injection: the new one, with what the adapter adapts and trains whole.
    """
    return _inject(listing, injection, values_follow=True)


def stored_parameters(handle: AdaptedModel) -> StoredParameters:
    """Return the parameters of the trained adapter, for replace_layers."""
    return [
        (holder, layer.stored_name(leaf), parameter)
        for layer in handle.layers.values()
        for holder in layer.lora_holders()
        for leaf, parameter in layer.stored().items()
    ]


def replace_layers(handle: AdaptedModel, earlier: StoredParameters, config: LoRAConfig, chosen: Chosen) -> AdaptedModel:
    """Take the adapters out of a model, and put in the layers of another adapter, whose values are loaded next.

    In place. What the earlier adapter fully trained has its first values again. A parameter with a successor of the
    same name stays the same object, because an optimizer may hold it; it loses its gradient. Where an exception broke
    a call off, another one with the same handle can follow.

    Args:
        handle: of the model. It is unmerged then.
        earlier: the parameters of the handle's adapter.
        config: the other adapter's options: its variant, dropout and dtype. The rest of them is only shown.
        chosen: what the other adapter adapts and trains whole.

    Returns:
        The new handle.
    """
    model, old = handle.model, handle.injection
    marks = old.marks - {"merged", "ended"}
    begun = find_adapted(Listing(model))
    # A call that was broken off may have begun another injection in the model, with layers where `handle` has some.
    # What was put in last is taken out first, so that the values from before both come back last.
    for each in [begun, handle] if begun is not None and begun.injection is not old else [handle]:
        each.look_for_layers_again()
        unmerge_if_merged(each)
        restore_initial_(each)  # first: strip_adapters ends the facts, which hold these values
        strip_adapters(each)
    injection = Injection(
        config,
        seed=old.seed,
        chosen=chosen,
        run=old.run,
        fits=old.fits,
        in_training_batch=old.in_training_batch,
        merged_to_evaluate=old.merged_to_evaluate,
        claims=old.claims,
    )
    injection.begin(model)
    take_over_attached(Listing(model), old, injection)
    new = cast(AdaptedModel, find_adapted(Listing(model)))
    adapt_new_layers(new, values_follow=True)
    for holder, name, parameter in earlier:
        successor = holder._parameters.get(name)
        if successor is not None and successor is not parameter:
            parameter.data, parameter.grad = successor.data, None
            parameter.requires_grad_(successor.requires_grad)
            holder.register_parameter(name, parameter)
    snapshot_initial(new)  # before the marks: with "validated" it records no parameter and no buffer with a value
    injection.marks |= marks
    return new


def unload(model: nn.Module) -> None:
    """Take the adapters out without merging. In place.

    Classes, names, values, parameter objects and requires_grad are as before injection. That includes the values of
    trained biases, modules_to_save and buffers. A weight that you unfroze after injection keeps its trained value, and
    a warning names it; only what LoRACallback saw unfrozen when an epoch began has its value from before.

    Raises:
        LoRAError: the model was not injected.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> unload(model)
        >>> print(*model.state_dict())
        0.weight 0.bias 2.weight 2.bias
    """
    handle = open_model(model, "unload")
    _warn_of_unknown_values(handle, "unload", stacklevel=3)
    modules = handle.all_modules()
    refuse_fully_sharded(handle.root, modules, "unload")
    with claimed("unload", handle.injection.claims):
        unmerge_if_merged(handle)
        with transaction() as on_error:
            # This completes the call: half an adapter is taken out sooner than put back.
            on_error.callback(take_out_adapter, handle)
            take_out_adapter(handle)


def take_out_adapter(handle: AdaptedModel) -> None:
    """Take the trained adapter and all patches out of an unmerged model. In place. Can be repeated.

    What was fully trained has its initial values again, and what is attached stays.
    """
    restore_initial_(handle)  # first: strip_adapters ends the facts, which hold these values
    strip_adapters(handle)
    unpatch(handle.all_modules())
    keep_attached(handle.root, handle.injection)


def merge_and_unload(model: nn.Module, *, dequantize: torch.dtype | str | None = None) -> nn.Module:
    """Merge the adapters, remove every trace of LoRA, and return the model with plain modules. In place.

    Args:
        model: an injected model.
        dequantize: the dtype of the plain weights that replace quantized weights, adapted or not. Layers of
            bitsandbytes become nn.Linear, and a transformers model forgets how it was quantized.

    Raises:
        LoRAError: the model was not injected; a layer was replaced since; W' is not finite; a layer shares its weight
            with another module; or a layer is quantized and `dequantize` is not given.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> before = model(x := torch.ones(1, 8))
        >>> torch.allclose(merge_and_unload(model)(x), before, atol=1e-5)
        True
        >>> print(*model.state_dict())
        0.weight 0.bias 2.weight 2.bias
    """
    dtype = dequantize_dtype(dequantize, "merge_and_unload")
    handle = open_model(model, "merge_and_unload", attached=True)
    refuse_replaced_layers(handle, "merge_and_unload")
    modules = handle.all_modules()
    refuse_fully_sharded(handle.root, modules, "merge_and_unload")
    with claimed("merge_and_unload", handle.injection.claims):
        refuse_unmergeable(handle, dtype)
        unmerge_listed(handle)  # a layer that could not be merged earlier may be mergeable now
        plain = dequantized_weights(handle.root_places, dtype) if dtype is not None else {}
        handle.injection.marks.add("quantized")  # no layer stays factored, so no message says that
        merge_listed(handle)

        def leave_merged() -> None:
            handle.look_for_layers_again()
            for layer in handle.all_layers.values():
                layer.lora.undo = None
                layer.lora.attached = None
            strip_adapters(handle)
            if plain:
                replace_quantized_(modules, plain)
                forget_quantization(modules)
            unpatch(modules)

        with transaction() as on_error:
            on_error.callback(leave_merged)  # completes it: a second merge of what is merged would be wrong
            leave_merged()
    return model


def _warn_of_unknown_values(handle: AdaptedModel, verb: str, stacklevel: int) -> None:
    """Warn of weights that were unfrozen after injection, so that their values from before training are not known."""
    names = handle.without_initial_values()
    if names:
        warnings.warn(
            f"lightning_lora: {verb} cannot bring back the values from before training of what was unfrozen after "
            f"injection ({listed(names)}), and leaves it as it is. Name such modules in modules_to_save instead.",
            stacklevel=stacklevel,
        )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Let the model behave as before injection inside the block; after the block it is as it was found.

    Trained biases, modules_to_save and persistent buffers have their initial values inside, and get no gradients there.
    Other tensors are put in the places of the trained ones, so that the backward of an earlier forward still works
    inside. A weight that you unfroze after injection is as in unload.

    Raises:
        LoRAError: the model was not injected; what is fully trained is sharded; or, inside the block, something saves,
            loads, copies, pickles or unloads the model.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = model(x := torch.ones(1, 8))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> with disable_adapter(model):
        ...     torch.equal(model(x), before)
        True
        >>> torch.equal(model(x), before)
        False
    """
    handle = open_model(model, "disable_adapter", attached=True)
    _warn_of_unknown_values(handle, "disable_adapter", stacklevel=4)
    with claimed("disable_adapter", handle.injection.claims) as claim:
        is_inside = any(handle.injection.claims.holds(verb, other_than=claim) for verb in (DISABLED, OFF))
        found = [] if is_inside else initial_values_of(handle)
        adapted = [module for _, module in handle.modules if isinstance(module, AdaptedModule)]
        modules = [] if is_inside else [*adapted, *(each.module for each in found)]
        were_active = {layer: layer.lora_active or layer.lora.merged for layer in handle.all_layers.values()}
        noted = handle.injection.strength_log.now
        state = FoundState(handle)

        def disable() -> None:
            unmerge_if_merged(handle)
            put_in_(found, modules)
            _set_active(handle, dict.fromkeys(were_active, False))
            handle.injection.strength_log.change({**noted, DISABLED: 0.0})

        def enable_again() -> None:
            take_out_(found, modules)
            unmerge_if_merged(handle)
            _set_active(handle, were_active)
            handle.injection.strength_log.change(noted)
            state.bring_back(handle)

        yield from run_block(claim, model, disable, enable_again)


def _inject(listing: Listing, injection: Injection, *, values_follow: bool = False) -> AdaptedModel:
    found = FoundState(listing)

    def bring_back() -> None:
        now = Listing(listing.model)
        if not now.layers:  # else all is done, and the exception came at the very end
            found.bring_back(now)

    with claimed("inject", injection.claims), transaction() as on_error:
        on_error.callback(bring_back)  # begin_injection unmerges what is attached alone
        handle, selection = begin_injection(listing, injection, values_follow=values_follow)
        finish_injection(handle, selection)
    return handle


def _tell_of_layers(handle: AdaptedModel) -> None:
    """Log which layers are left out, and the option that adapts experts, as LoRACallback's summary does."""
    injection, reasons = handle.injection, dict[str, list[str]]()
    for name, reason in handle.left_out().items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        are = "is" if len(names) == 1 else "are"
        tell(f"lightning_lora: {listed(names)} {are} left out of {injection.config.target_modules!r}: {reason}.")
    if option := option_for_experts(handle):
        tell(f"lightning_lora: {injection.config.target_modules!r} does not adapt the experts; {option} does")


def begin_injection(
    listing: Listing, injection: Injection, *, values_follow: bool = False
) -> tuple[AdaptedModel, Selection]:
    """Adapt the layers that exist now. In place.

    adapt_new_layers adapts layers that are built later, and finish_injection checks that each option names something.

    Args:
        listing: of the model.
        injection: the new one, with its options.
        values_follow: an adapter is loaded next, so no initial values are computed from weights.

    Returns:
        The handle, and what the options name.
    """
    earlier = find_attached_alone(listing)
    check_unadapted(listing.modules)
    claims = [injection.claims] if earlier is None else [injection.claims, earlier.injection.claims]
    with claimed("inject", *claims):
        if earlier is not None:
            injection.attached = dict(earlier.injection.attached)
            earlier.injection.end(earlier.root)
        injection.begin(listing.model)
        handle = with_lists(AdaptedModel(listing.model, listing.model, injection), listing)
        with transaction() as on_error:
            on_error.callback(take_out_adapter, handle)
            if earlier is not None:
                take_over_attached(listing, earlier.injection, injection)
            selection = adapt_new_layers(handle, values_follow=values_follow)
            snapshot_initial(handle)
            if "merges by mode" in injection.marks:
                patch(handle.root, "train", _merge_by_mode)
    return handle, selection


def finish_injection(handle: AdaptedModel, selection: Selection) -> None:
    """Check that each entry of the options names something, when all layers are built.

    Args:
        handle: of the model.
        selection: what the options name in it.

    Raises:
        LoRAError: an entry names nothing. The adapters are then taken out.
    """
    root, injection = handle.root, handle.injection
    with claimed("adopt", injection.claims), transaction() as on_error:
        on_error.callback(take_out_adapter, handle)
        if errors := selection.unmatched.errors:
            sentences = "\n".join(map(sentence, errors))
            raise LoRAError(f"inject: {type(root).__name__}: {sentences}")
    if "validated" not in injection.marks:
        warn_of_unused(selection, stacklevel=4)
        for name, module in handle.root_places:
            if name in selection.left_out and (facts := facts_of(module)) is not None:
                facts.left_out = selection.left_out[name]
        for name in selection.saved_instead:
            tell(f"lightning_lora: {name} {TRAINED_WHOLE}")
    injection.marks.add("validated")


def adapt_new_layers(handle: AdaptedModel, *, values_follow: bool = False) -> Selection:
    """Adapt the named layers that are not adapted yet, freeze new parameters, and return what the options name."""
    with claimed("adopt", handle.injection.claims):
        root, injection = handle.root, handle.injection
        scope = injection.chosen.scope.removesuffix(".") if injection.chosen else ""
        begin_facts(handle.root_places, injection, scope=scope)
        check_shapes(handle.root_modules)
        selection = selected(handle.root_modules, injection)
        # What is new, in four forms: layers; attention with q, k and v apart, only to be checked, for its weights are
        # among the parameters; single parameters; tables.
        live = {
            name: each
            for name, each in adapted_layers(root, modules=handle.root_modules).items()
            if each.has_trained_adapter()
        }
        new = {name: module for name, module in selection.layers.items() if name not in live}
        apart = {
            name
            for name, module in selection.apart.items()
            if not any(each.has_trained_adapter() for each in adapters_in(module).values())
        }
        parameters = {name: place for name, place in selection.parameters.items() if name not in live}
        modules = dict(handle.root_modules)
        tables = {name: rows for name, rows in selection.tables.items() if not isinstance(modules[name], LoRATable)}
        selection.refuse(modules, injection.config, {*new, *apart, *parameters, *tables})
        check_trainable(handle.root_modules, selection.saved, injection.config)
        if new or apart or parameters or tables:
            with claimed("inject", injection.claims):  # refused inside of a block, where adopting what is there is not
                pass
        _freeze(handle, new, selection.saved)
        if injection.attached:  # readers of weights are patched, and a patched module cannot be adapted
            undo_readers(module for _, module in handle.root_modules)
        seed = injection.seed or random_seed()
        with torch.inference_mode(False), progress_bar("drawing adapters", len(new) + len(parameters)) as advance:
            for name, module in new.items():
                spec = _spec(name, injection, seed, selection.outputs.get(name, name))
                _create_tensors(adapt_(module, name, spec, injection), values_follow)
                advance(1)
            for name, (module, leaf) in parameters.items():
                spec = _spec(name, injection, seed, name)
                _create_tensors(adapt_parameter_(module, leaf, name, spec, injection), values_follow)
                advance(1)
            for name, rows in tables.items():
                _adapt_table(handle, name, modules[name], rows, values_follow)
        handle.look_for_layers_again()
        record_and_patch_layers(handle)
        handle.record_trainable(expected=True)
        _record_resized(handle)
        return selection


def strip_adapters(handle: AdaptedModel) -> None:
    """Take the trained adapter out; patched methods and attached adapters stay. In place."""
    injection, modules = handle.injection, [module for _, module in handle.root_modules]
    allow_packing_(modules)
    for tensor, fact in handle.known.values():
        if fact.requires_grad is not None:
            tensor.requires_grad_(fact.requires_grad)
    for layer in adapted_layers(handle.root, modules=handle.root_modules).values():
        with layer.lora.lock:  # another thread's forward may have W' in the weight's place
            if layer.lora.attached is None:
                unadapt_(layer)
            else:
                layer.unload_trained()
    handle.look_for_layers_again()
    patch_readers(modules)
    update_fast_paths(modules)
    disable_input_require_grads(modules)
    unhook_load_state_dict(modules)
    end_facts(handle.all_modules(), injection)
    injection.end(handle.root)


def fixed_seed(seed: int, verb: str = "inject") -> str:
    """Return the text that adapters are drawn from for a seed that the user gave.

    Raises:
        LoRAError: the seed is not a whole number. The message begins with the verb.
    """
    seed = plain_number(seed)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise LoRAError(f"{verb}: seed must be a whole number, but it is {seed!r}.")
    return f"seed {seed}:"


def random_seed() -> str:
    """Return a text made from the state of torch's random stream, which is not advanced."""
    return hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()


def _refuse_other(earlier: AdaptedModel, config: LoRAConfig, merge_weights: bool, seed: int | None) -> None:
    """Raise LoRAError where an injected model was injected elsewhere or with other arguments."""
    model, injection, differences = earlier.model, earlier.injection, earlier.injection.config.differences(config)
    if earlier.root is not model:
        inner, outer = earlier.prefix.removesuffix("."), earlier.inside.removesuffix(".")
        name, around = (inner, model) if inner else (outer, earlier.root)
        raise LoRAError(f"inject: {name!r} inside {type(around).__name__} was injected already; unload it first.")
    if differences:
        options = ", ".join(differences)
        raise LoRAError(f"inject: {type(model).__name__} was injected with other options ({options}); unload it first.")
    if merge_weights != ("merges by mode" in injection.marks):
        raise LoRAError(
            f"inject: {type(model).__name__} was injected with merge_weights={not merge_weights}; unload it first."
        )
    if seed is not None and fixed_seed(seed) != injection.seed:
        raise LoRAError(f"inject: {type(model).__name__} was injected with another seed; unload it first.")


def _record_resized(handle: AdaptedModel) -> None:
    """Record resized embeddings as trained, as PEFT does, because each program fills their new rows differently."""
    resized = {id(weight) for weight in resized_embeddings(handle.root_modules) if not weight.is_meta}
    known = handle.known if resized else {}
    for each in handle.base() if resized else ():
        key = id(each.parameter)
        if key in resized and (key not in known or known[key].fact.trained is None):
            handle.record_as_trained(each, "resized", keep=True)
            tell(f"lightning_lora: {each.name} was resized to {len(each.parameter)} rows: saved with the adapter.")


def _set_active(handle: AdaptedModel, active: Mapping[AdaptedWeights, bool]) -> None:
    """Let each adapter act or not. In place."""
    for layer, is_active in active.items():
        layer.lora_active = is_active
    update_fast_paths(module for _, module in handle.root_modules)


def _freeze(handle: AdaptedModel, new: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    """Freeze base parameters, but for biases and modules that are fully trained. In place.

    Args:
        handle: of the model; its injection notes requires_grad from before.
        new: the layers that are about to be adapted.
        saved: the modules that are fully trained.
    """
    injection = handle.injection
    bias = injection.config.bias if injection.chosen is None else "none"
    trainable = {id(parameter) for module in saved.values() for parameter in module.parameters()}
    if injection.chosen is not None:
        whole = injection.chosen.whole
        trainable |= {id(tensor) for name, tensor, _ in state_of(handle.root_places) if name in whole}
    if bias == "lora_only":
        trainable |= {id(module.bias) for module in new.values() if getattr(module, "bias", None) is not None}
    is_new_base = False
    for each in handle.base():
        parameter = each.parameter
        fact = handle.fact(each.module, each.leaf, parameter)
        rebuilt = new or is_sharded(parameter)  # a parameter that was frozen may have been replaced by a trainable one
        if fact.requires_grad is not None and (not rebuilt or fact.trained is not None):
            continue
        if fact.requires_grad is None:
            fact.requires_grad = parameter.requires_grad
            is_new_base = True
        everywhere = bias == "all" and each.leaf == "bias"  # PEFT's rule: no in_proj_bias
        parameter.requires_grad_(parameter.is_floating_point() and (everywhere or id(parameter) in trainable))
    if is_new_base:  # a fingerprint was taken of a base without these parameters
        handle.set_fingerprint({})


def _spec(name: str, injection: Injection, seed: str, in_patterns: str) -> LayerSpec:
    """Return what the options say of the adapter of one layer or parameter, or what a loaded adapter has there.

    Args:
        name: of the layer or parameter.
        injection: with the options.
        seed: the text that adapters are drawn from.
        in_patterns: the name that rank_pattern and alpha_pattern are asked for.
    """
    config, chosen = injection.config, injection.chosen.layers.get(name) if injection.chosen is not None else None
    r, scaling, parts = config.rank(in_patterns), config.scaling(in_patterns), config.enabled_parts(name)
    if chosen is not None:
        r, scaling, parts = chosen.r, chosen.scaling, chosen.parts
    return LayerSpec(
        r=r,
        alpha=config.alpha_of(r, scaling),
        scaling=scaling,
        dropout=config.lora_dropout,
        enabled=parts,
        keep_float32=config.autocast_adapter_dtype,
        init=config.init_lora_weights,
        variant=variant_of(config),
        options=config.all_variant_options(),
        seed=int.from_bytes(hashlib.sha256((seed + name).encode()).digest()[:8], "big") >> 1,
    )


def _adapt_table(
    handle: AdaptedModel, name: str, module: nn.Module, rows: tuple[int, ...], values_follow: bool
) -> None:
    """Train rows of a table. Tied tables share one adapter."""
    injection = handle.injection
    tied = table_adapters(module for _, module in handle.root_modules).get(id(module.weight))
    if tied is not None:
        share_table_(module, tied)
        return
    keep_float32 = injection.config.autocast_adapter_dtype
    spec = LayerSpec(
        r=len(rows), alpha=len(rows), scaling=1.0, variant=TrainedRows(), keep_float32=keep_float32, rows=rows
    )
    _create_tensors(adapt_table_(module, name, spec, injection), values_follow)


def _create_tensors(layer: AdaptedWeights, values_follow: bool) -> None:
    """Create the adapter's tensors in the weight's dtype, or in float32 for 16-bit weights. In place."""
    dtype = layer.weight_dtype()
    layer.create_(
        torch.float32 if dtype in HALF and layer.lora.spec.keep_float32 else dtype, values_follow=values_follow
    )


def _merge_by_mode(module: nn.Module, previous: Callable[..., Any] | None, mode: bool = True) -> nn.Module:
    """Replace train() of a module that was injected with merge_weights: merge or unmerge all layers at once."""
    call_previous(module, previous, "train", mode)
    (unmerge if mode else merge)(module)
    return module
