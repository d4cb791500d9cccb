"""Look in a Trainer for adapters that training does not reach: without a gradient, or without an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..model.adapted_model import AdaptedModel, Listing, find_model
from ..model.gradients import warn_of_untrained
from ..model.injection import Injection
from ..model.optimizer_steps import note_steps
from ..names import listed
from .deepspeed_optimizer import held_parameters, holds_copies

Held = Sequence[Collection[int]]  # for each optimizer, the ids of the parameters that it trains


def begin_to_note(handle: AdaptedModel) -> None:
    """Note optimizers' steps of a fit that starts, where some layers were not looked at yet. In place."""
    for noted in handle.record.steps:
        noted.clear()
    if not all(layer.lora.training_checked for layer in handle.layers.values()):
        note_steps(handle.record)


def warn_of_untrained_in(trainer: Any, module: nn.Module, *, loading: bool = False) -> None:
    """Warn once of layers that the first step of their optimizer did not train, and of those that no optimizer holds.

    Args:
        trainer: of the module, or None.
        module: an injected LightningModule.
        loading: a checkpoint is about to be loaded. The Trainer may still have the optimizers of an earlier fit.
    """
    handle = find_model(module)
    if handle is None or trainer is None:
        return
    held = [_held(optimizer, handle.record) for optimizer in trainer.optimizers]
    if handle.record.began_frozen and held and not loading:
        _warn_of_unoptimized(handle, held)
    warn_of_untrained(Listing(module), held=held, held_alone=loading)


def _held(optimizer: Any, record: Injection) -> set[int]:
    """Return the ids of the parameters that an optimizer trains now. Of DeepSpeed's, which is alone, its copies too.

    Frozen ones are left out: layers of several optimizers may share them.
    """
    held = {id(parameter) for parameter in held_parameters(optimizer) if parameter.requires_grad}
    return held | record.steps.on_gradients if holds_copies(optimizer) else held


def _warn_of_unoptimized(handle: AdaptedModel, held: Held) -> None:
    """Warn once of layers that were frozen when the fit began, get gradients now, and are in no optimizer."""
    optimized = {each for of in held for each in of}
    unchecked = {name: layer for name, layer in handle.layers.items() if not layer.lora.training_checked}
    trained = {name: layer.factors()[-1] for name, layer in unchecked.items() if layer.lora.gradient_arrived}
    missing = [name for name, factor in trained.items() if factor.requires_grad and id(factor) not in optimized]
    if missing:
        for name in missing:
            handle.layers[name].lora.training_checked = True
        warnings.warn(
            f"lightning_lora: the adapters of {len(missing)} layers were frozen when the fit began and get gradients "
            f"now, but no optimizer holds them, so they stay as they are: {listed([repr(name) for name in missing])}. "
            "Build the optimizer from self.parameters() without a filter, or call optimizer.add_param_group when they "
            "are unfrozen.",
            stacklevel=2,
        )
