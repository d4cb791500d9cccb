"""Look in a Trainer for adapters that training or forwards do not reach.

In a fit that is before an optimizer's first step, and in another run at the end of an evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..distributed.deepspeed_optimizer import held_parameters, holds_copies
from ..model.adapted_model import Listing, find_adapted
from ..model.gradients import warn_of_layers, warn_of_unread
from ..names import listed
from .run_state import injection_of, run_of


def look_for_gradients(optimizers: Sequence[Any], optimizer: Any, module: nn.Module) -> None:
    """Warn of adapters that an optimizer, which is about to step, does not train. Once for each optimizer and fit.

    The first of the optimizers also finds adapters that are frozen and in none of them. The last one finds attached
    adapters that no forward has read: with several optimizers, each trains another part.

    Args:
        optimizers: of the Trainer.
        optimizer: the one that is about to step.
        module: a LightningModule.
    """
    injection = injection_of(module)
    if injection is None:
        return
    run = run_of(injection)
    if id(optimizer) in run.looked_at:
        return
    parameters = held_parameters(optimizer)
    knows_gradients = not holds_copies(optimizer)  # DeepSpeed keeps them elsewhere
    if knows_gradients and all(parameter.grad is None for parameter in parameters):
        return  # the step is skipped
    is_first = not run.looked_at
    run.looked_at |= {id(optimizer)}
    listing = find_adapted(module) or Listing(module)  # the handle leaves frozen copies out
    if len(run.looked_at) >= len(optimizers) and injection.attached:
        warn_of_unread(listing, has_run=True)
    if knows_gradients:
        held = {id(parameter) for parameter in parameters}
        others = {id(parameter) for each in optimizers for parameter in held_parameters(each)} - held
        _warn_of_lacking(listing, lambda key: key in held or (is_first and key not in others))


def look_for_reads(trainer: Any, module: nn.Module) -> None:
    """Warn of attached adapters that no forward of an evaluation has read, where that is no part of a fit."""
    injection = injection_of(module)
    if injection is not None and injection.attached and trainer.state.fn != "fit":
        warn_of_unread(Listing(module), has_run=True)


def _warn_of_lacking(listing: Listing, is_looked_at: Callable[[int], bool]) -> None:
    """Warn of layers without a gradient; `is_looked_at` tells whether to look at a parameter of this id."""
    last = {name: layer.trained_tensors()[-1] for name, layer in listing.layers.items()}
    lacking = {name: factor for name, factor in last.items() if factor.grad is None and is_looked_at(id(factor))}
    unreached = [name for name, factor in lacking.items() if factor.requires_grad]
    frozen = [repr(name) for name in lacking if name not in unreached]
    if unreached:
        warn_of_layers("no gradient has reached the adapters", listing.layers, unreached)
    if frozen:
        warnings.warn(
            f"lightning_lora: the adapters of {len(frozen)} layers are frozen ({listed(frozen)}) and not trained until "
            "something unfreezes them. If nothing is meant to, put the callback that freezes a backbone in setup "
            "before LoRACallback in the list.",
            stacklevel=2,
        )
