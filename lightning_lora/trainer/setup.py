"""What LoRACallback does in setup: adapt the LightningModule's layers, those that exist and those that it builds later.

Each step needs what the one before it left:

    Lightning calls         what happens here
    callback.setup          set_up checks the Trainer, reads the checkpoint's options and seed, the same on each rank,
                            and adapts the layers that exist (_inject), or takes an earlier injection over (_take_over).
                            It patches the last of the next two methods that the module has.
    module.setup            may build layers. Where configure_model is the patched one, those are adapted there, before
                            it runs.
    module.configure_model  may build layers, and shard them. _build_and_adapt adapts what was built before, calls the
                            method, and adapts what that has built. Only now all layers are there: first values are
                            kept, and each entry of the options must have named something (the mark "validated").
    teardown                stop_adapting takes the patch out.

A module with neither method has all layers in callback.setup, and is finished there. The strategy wraps the module and
builds the optimizers after all of this.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.identity import digest_of
from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..exchange.align import align_names, order_in
from ..exchange.attach import attach
from ..exchange.first_names import Names
from ..formats.sources import read_source
from ..model.adapted_model import AdaptedModel, Listing, find_adapted
from ..model.attached import take_out_attached_
from ..model.initial_values import snapshot_initial
from ..model.inject import adapt_new_layers, begin_injection, finish_injection, random_seed
from ..model.injection import Injection
from ..model.patches import call_previous, patch, unpatch_method
from ..model.quantize import quantize_
from ..model.targets import selected
from ..notices import tell
from ..private.deepspeed import outside_zero_init
from ..private.lightning import starts_processes
from .after_fit import forget_merging, load_plain_weights_only
from .checkpoint_hooks import save_as
from .checkpoint_options import (
    complete_options,
    layers_in_checkpoint,
    options_in_checkpoint,
    refuse_folder_for_checkpoint,
)
from .cli_optimizer import adapt_cli_optimizer
from .compatibility import refuse_composition, refuse_other_options
from .lightning_packages import is_overridden
from .options import Options, seed_text, sources_of
from .precision import (
    convert_linear_layers_,
    leave_out_of_ddp_,
    refuse_for_quantized,
    refuse_late_conversion,
)
from .run_state import is_merged_for_good, run_of

BUILDERS = ("configure_model", "setup")  # the last that Lightning calls first


def set_up(trainer: Any, module: Any, options: Options, stage: str) -> None:
    """Adapt the module before the optimizer is built and the strategy wraps; patch the module's hooks. In place.

    A module that an earlier fit merged for good is evaluated as it is.

    Args:
        trainer: in its setup.
        module: the LightningModule, injected or not.
        options: the LoRACallback.
        stage: "fit", "validate", "test" or "predict".

    Raises:
        LoRAError: the Trainer, its callbacks or the model do not go with these options.
    """
    is_injected = find_adapted(module) is not None
    refuse_composition(trainer, options, injected=is_injected)
    refuse_folder_for_checkpoint(trainer)
    _refuse_attaching_in_workers(trainer, module, options)
    if is_merged_for_good(module):
        if not is_injected and stage != "fit":
            load_plain_weights_only(module)
            return
        forget_merging(module)
    saved = None if is_injected else options_in_checkpoint(trainer)
    seed, saved = trainer.strategy.broadcast((random_seed(), saved))  # also where this process alone is injected
    config, chosen = options.config, None
    if saved is not None:
        config = complete_options(config, options.given, saved.config)
        chosen = layers_in_checkpoint(saved, config, module)
    _tell_of_checkpoint_options(options.config, config)
    adapt_cli_optimizer(module)
    _adapt_now(module, options, Injection(config, seed=seed_text(options) or seed, chosen=chosen))
    if (handle := find_adapted(module)) is not None:
        refuse_for_quantized(handle, trainer)


def _tell_of_checkpoint_options(config: LoRAConfig, completed: LoRAConfig) -> None:
    """Say which of a callback's options are a checkpoint's: a command line gives defaults, which count as left out."""
    taken = [f"{name}={shown(getattr(completed, name), 60)}" for name in completed.differing(config)]
    if taken:
        tell(f"lightning_lora: {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} the checkpoint's.")


def _adapt_now(module: nn.Module, options: Options, injection: Injection) -> None:
    """Adapt the layers that exist now, or adopt an earlier injection; patch the method that may build others. In place.

    Args:
        module: the LightningModule.
        options: the LoRACallback.
        injection: begins where there is none yet.
    """
    stop_adapting(module)  # of a run that an exception ended
    last = next((name for name in BUILDERS if is_overridden(name, module)), None)
    handle = find_adapted(module)
    if handle is None:
        handle = _inject(module, options, injection, is_complete=last is None)
    else:
        _take_over(handle, options)
    _prepare_ddp_and_checkpoints(handle, options)
    if last is not None:
        patch(module, last, _build_and_adapt, last, options, injection)
    elif handle is not None and "validated" not in handle.injection.marks:  # an earlier setup was broken off
        finish_injection(handle, adapt_new_layers(handle))
    _attach_sources(module, options, is_complete=last is None)


def stop_adapting(module: nn.Module) -> None:
    """Take the patch out. It stays for the whole setup, because WeightAveraging calls configure_model early."""
    for name in BUILDERS:
        unpatch_method(module, name, _build_and_adapt)


def _build_and_adapt(
    module: nn.Module,
    previous: Any,
    name: str,
    options: Options,
    injection: Injection,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Adapt what was built before, call the method of this name, which may shard it, and adapt what that built."""
    _adapt_built(module, options, injection, is_complete=False)
    attached_before = _attached_in(module)
    call_previous(module, previous, name, *args, **kwargs)
    _take_out_of_rebuilt(module, options, attached_before)
    _adapt_built(module, options, injection, is_complete=True)


def _adapt_built(module: nn.Module, options: Options, injection: Injection, *, is_complete: bool) -> None:
    """Adapt the layers that are not adapted yet; where all layers are there, check that each option names something."""
    with outside_zero_init():
        handle = find_adapted(module)
        if handle is None:
            _prepare_ddp_and_checkpoints(_inject(module, options, injection, is_complete=is_complete), options)
        else:
            if "validated" in handle.injection.marks:  # by an earlier run, or by the user's method
                _take_over(handle, options)
            convert_linear_layers_(handle)
            if (kind := run_of(handle.injection).quantize) is not None:
                quantize_(handle, kind, handle.injection.config)
            selection = adapt_new_layers(handle)
            _prepare_ddp_and_checkpoints(handle, options)
            if is_complete:
                snapshot_initial(handle)
                finish_injection(handle, selection)
        _attach_sources(module, options, is_complete=is_complete)


def _inject(module: nn.Module, options: Options, injection: Injection, *, is_complete: bool) -> AdaptedModel | None:
    """Inject the layers that exist, all where is_complete; where more may follow and none is named yet, return None."""
    listing = Listing(module)
    refuse_late_conversion(listing)
    convert_linear_layers_(listing)
    if options.quantize is not None:
        quantize_(listing, options.quantize, injection.config)
    if not is_complete and selected(listing.modules, injection).is_empty():
        return None
    run_of(injection).quantize = options.quantize
    handle, selection = begin_injection(listing, injection)
    if is_complete:
        finish_injection(handle, selection)
    return handle


def _take_over(handle: AdaptedModel, options: Options) -> None:
    """Check that the earlier injection of a module agrees with the options, and take it over. In place.

    Dropout may be another: it is of training alone, and no tensor depends on it.
    """
    refuse_late_conversion(handle)
    handle.injection.marks.discard("factored")  # because of evaluations of an earlier run
    refuse_other_options(handle, options.config, options.given, seed_text(options))
    if "lora_dropout" in options.given:
        dropout = options.config.lora_dropout
        handle.injection.config = replace(handle.injection.config, lora_dropout=dropout)
        for name in handle.kinds:
            layer = handle.layers[name]
            layer.lora.spec = replace(layer.lora.spec, dropout=dropout)


def _prepare_ddp_and_checkpoints(handle: AdaptedModel | None, options: Options) -> None:
    """Let DDP and checkpoints take what they can take of an injected module. In place."""
    if handle is not None:
        leave_out_of_ddp_(handle)
        save_as(handle, options.save, options.dequantize)


def _attach_sources(module: nn.Module, options: Options, *, is_complete: bool) -> None:
    """Attach the adapters of LoRACallback(attach=...) that are not attached yet. In place.

    Args:
        module: the LightningModule.
        options: the LoRACallback.
        is_complete: all layers are there. Otherwise an adapter waits whose layers are built later.

    Raises:
        LoRAError: an adapter does not go with the model.
    """
    for name, each in sources_of(options.attach).items():
        adapter = read_source(each.source, order_in(module), "LoRACallback")
        handle = find_adapted(module, attached=True)
        if handle is not None and name in handle.injection.attached:
            if handle.injection.attached[name].fingerprint != digest_of(adapter):
                raise LoRAError(
                    f"LoRACallback: attach names another adapter {name!r} than the one that is attached to the model. "
                    f"Call detach(model, {name!r}) first, or give it another name."
                )
            if each.strength not in (None, here := handle.injection.attached[name].strength):
                raise LoRAError(
                    f"LoRACallback: attach gives {name!r} the strength {each.strength:g}, and it is attached to the "
                    f"model with {here:g}. Call set_strength(model, {each.strength:g}, {name!r}) first, or leave the "
                    "strength out."
                )
        elif is_complete or _has_layers(Listing(module), adapter):
            attach(module, adapter, name=name, strength=1.0 if each.strength is None else each.strength)


def _has_layers(listing: Listing, adapter: Adapter) -> bool:
    """Return whether a model has all layers of an adapter, under one prefix."""
    try:
        align_names(listing, Names(listing.places), adapter)
    except LoRAError:
        return False
    return True


def _attached_in(module: nn.Module) -> Counter[str]:
    """Return in how many layers each attached adapter acts, by name."""
    layers = Listing(module).all_layers.values()
    return Counter(name for layer in layers for name in layer.attached())


def _take_out_of_rebuilt(module: nn.Module, options: Options, before: Counter[str]) -> None:
    """Take out each attached adapter of which some layers are gone, because a method built them anew. In place.

    Raises:
        LoRAError: the callback has no source from which to attach it again.
    """
    handle, now = find_adapted(module, attached=True), _attached_in(module)
    for name, layers in before.items():
        if handle is None or now[name] == layers:
            continue
        if name not in sources_of(options.attach):
            raise LoRAError(
                f"LoRACallback: {type(module).__name__} built layers anew to which {name!r} was attached. Let the "
                f"callback attach it: LoRACallback(attach={{{name!r}: source}})."
            )
        take_out_attached_(handle, name)


def _refuse_attaching_in_workers(trainer: Any, module: nn.Module, options: Options) -> None:
    """Raise LoRAError where processes that the strategy starts would attach adapters, and this one would not."""
    missing = sorted(sources_of(options.attach).keys() - _attached_in(module).keys())
    if missing and trainer.state.fn == "fit" and starts_processes(trainer):
        raise LoRAError(
            f"LoRACallback: {type(trainer.strategy).__name__} starts processes from this one and brings back weights "
            f"only, so the main process needs {missing[0]!r} attached too. Call attach(model, source, "
            f"name={missing[0]!r}) before fit, or use strategy='ddp'."
        )
