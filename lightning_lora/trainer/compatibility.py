"""Refuse Trainers, callbacks and models that LoRACallback cannot be combined with, and say the remedy.

Classes are recognised by name, so that neither Lightning nor DeepSpeed is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig, options_that_decide
from ..distributed.deepspeed_optimizer import held_parameters
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, Listing
from ..model.targets import select
from ..names import listed
from ..private.lightning import is_stand_in, starts_processes

TARGETS = options_that_decide("layers")
PARTS = options_that_decide("parts")
RANKS = options_that_decide("ranks", "scaling")
BY_LAYER = (*TARGETS, *PARTS, *RANKS)
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
OF_THE_ADAPTER = "LoRAWeightAveraging"  # which is a WeightAveraging that leaves frozen weights alone


def refuse_composition(trainer: Any, callback: Any, *, injected: bool) -> None:
    """Raise LoRAError where this callback would give wrong results in this Trainer. The message has the remedy.

    Args:
        trainer: the Trainer, in setup.
        callback: the LoRACallback.
        injected: the model was injected before this setup.
    """
    fitting, order = trainer.state.fn == "fit", trainer.callbacks
    for position, neighbour in enumerate(order):
        name = type(neighbour).__name__
        if neighbour is not callback and _is_a(neighbour, "LoRACallback"):
            raise LoRAError(
                "LoRACallback: the Trainer has two LoRA callbacks for one model. Leave one out: LoRACLI brings its own "
                "with the options under lora, so trainer.callbacks needs none."
            )
        sliced_by = slicing(trainer.strategy)
        if fitting and averages_frozen(neighbour) and sliced_by:
            raise LoRAError(
                f"LoRACallback: {name} copies whole weights, and {sliced_by} has slices of them. "
                f"Use {OF_THE_ADAPTER}, which averages the adapter alone, or strategy='ddp' where the base fits on one "
                "device."
            )
        if fitting and _is_a(neighbour, *AVERAGING) and position < order.index(callback):
            raise LoRAError(
                f"LoRACallback: {name} copies weights before training and swaps them around validation, so it must "
                f"come after LoRACallback: callbacks=[LoRACallback(...), {name}(...)]."
            )
    if fitting and not injected and starts_processes(trainer):
        raise LoRAError(
            f"LoRACallback: {type(trainer.strategy).__name__} starts processes from this one and brings back weights "
            "only, so the main process needs the adapters too. Call inject(model, LoRAConfig(...)) before fit, or use "
            "strategy='ddp'."
        )


def averages_frozen(callback: Any) -> bool:
    """Return whether a callback averages all weights of a model, those of the frozen base too."""
    return _is_a(callback, *AVERAGING) and not _is_a(callback, OF_THE_ADAPTER)


def slicing(strategy: Any) -> str:
    """Return the name of a strategy under which each rank has slices of weights, or "". None is imported for it."""
    config = getattr(strategy, "config", None)
    zero = config.get("zero_optimization") if _is_a(strategy, "DeepSpeedStrategy") and config else None
    if zero and zero.get("stage") == 3:
        return "DeepSpeedStrategy at stage 3"
    return "FSDPStrategy" if _is_a(strategy, "FSDPStrategy") else ""


def refuse_other_options(handle: AdaptedModel, config: LoRAConfig, given: Collection[str], seed: str = "") -> None:
    """Raise LoRAError where a model was injected with other options than the callback was given.

    A loaded adapter has the options of another run. Where they differ, its layers are compared with those that the
    callback's options select.

    Args:
        handle: of the injected model.
        config: the callback's options.
        given: the names of the options that the user gave.
        seed: the callback's seed, or "".
    """
    injection = handle.injection
    if "merges by mode" in injection.marks:
        raise LoRAError(
            "LoRACallback: the model was injected with merge_weights=True, where eval() merges: a backbone kept "
            "in eval mode would silently stop training. Call unload(model), then inject(model, config) without it."
        )
    differing = [option for option in injection.config.differing(config) if option in given]
    if injection.chosen is not None and _selects_layers(handle, config, given, differing):
        differing = [option for option in differing if option not in BY_LAYER]
    for option in differing:
        if option != "lora_dropout":  # which is of training alone: _adopt takes it
            raise LoRAError(
                f"LoRACallback: {option} is {getattr(config, option)!r}, but the model was injected with "
                f"{getattr(injection.config, option)!r}; use the same, or leave it out. unload(model) takes the "
                "adapter out, so save it first."
            )
    if seed and injection.seed != seed:
        raise LoRAError("LoRACallback: the model was injected with another seed; give none, or unload(model) first.")


def _selects_layers(
    handle: AdaptedModel, config: LoRAConfig, given: Collection[str], differing: Collection[str]
) -> bool:
    """Return whether a callback's options select the layers of a model, in what the differing ones say of them.

    Words that were not given are the loaded adapter's. Its patterns may name its layers as in another module.
    """
    asked = replace(handle.injection.config, **{name: getattr(config, name) for name in BY_LAYER if name in given})
    live = {layer.lora.name: layer.lora.spec for layer in handle.layers.values() if layer.kind()}
    selection = select(handle.root_modules, asked)
    if not {*TARGETS}.isdisjoint(differing) and selection.names() != live.keys():
        return False
    if not {*PARTS}.isdisjoint(differing) and any(
        asked.enabled_parts(name) != spec.enabled for name, spec in live.items()
    ):
        return False
    in_patterns = {name: selection.outputs.get(name, name) for name in live}
    return {*RANKS}.isdisjoint(differing) or all(
        asked.rank(in_patterns[name]) == spec.r and math.isclose(asked.scaling(in_patterns[name]), spec.scaling)
        for name, spec in live.items()
    )


def refuse_unoptimized(optimizers: Sequence[torch.optim.Optimizer], listing: Listing) -> None:
    """Raise LoRAError for the first trainable adapter parameter that no optimizer holds.

    A fit without any optimizer passes: Lightning itself warns of a configure_optimizers that returns None.
    """
    if optimizers and all(map(is_stand_in, optimizers)):
        return
    optimized = {id(parameter) for optimizer in optimizers for parameter in held_parameters(optimizer)}
    factors = _factors(listing)
    missing = [name for name, factor in factors.items() if factor.requires_grad and id(factor) not in optimized]
    if missing:
        shown = listed([repr(layer) for layer in dict.fromkeys(name.rpartition(".")[0] for name in missing)])
        raise LoRAError(
            f"LoRACallback: no optimizer holds the adapter parameter {missing[0]!r} ({len(missing)} of {len(factors)} "
            "are in none), so it would never be trained. Build the optimizer in configure_optimizers from "
            "self.parameters() at that time, not from parameters collected in __init__. Where a library builds it "
            "earlier, call inject on the network before that. If it is meant for some layers only, adapt those alone: "
            f"leave the others out with exclude_modules=[{shown}], or name those in target_modules."
        )


def _factors(listing: Listing) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{layer.stored_name(leaf)}": factor
        for name, layer in listing.layers.items()
        for leaf, factor in zip(layer.lora.spec.variant.trained, layer.trained_tensors(), strict=True)
    }


def _is_a(instance: object, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(instance).__mro__)
