"""Warn of adapters that training does not reach: layers without a gradient, and an optimizer without the adapters.

A hook on each B notes its first gradient and then removes itself. The notes are looked at once: after the first
training batch in a Trainer, or before it loads a checkpoint, as a finder of Lightning's does after its trials; and at
the first merge or save after a gradient in a plain loop.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..nn.adapted_weights import AdaptedWeights, NamedModules, adapted_layers
from ..nn.gradient_checkpointing import REENTRANT, REENTRANT_REMEDY
from .adapted_model import Listing

SHOWN = 5  # names in a warning


def note_gradient(layer: AdaptedWeights) -> None:
    """Let a layer note when the first gradient arrives at B, its last factor."""
    state = layer.lora

    def note(parameter: torch.Tensor) -> None:
        state.gradient_arrived = True
        hook.remove()

    hook = layer.factors()[-1].register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]


def warn_of_untrained(listing: Listing, *, optimized: bool = False, stacklevel: int = 4) -> None:
    """Warn once a model, after training has begun, of adapters that training does not reach.

    Args:
        listing: of any module that holds adapted layers.
        optimized: an optimizer is known to hold the adapters.
        stacklevel: of the warning, so that it shows the user's line.
    """
    layers = {name: layer for name, layer in listing.layers.items() if not layer.lora.injection.training_checked}
    layers = {name: layer for name, layer in layers.items() if layer.factors()[-1].requires_grad}
    reached = {each for each in layers.values() if each.lora.gradient_arrived or each.factors()[-1].grad is not None}
    if not layers or not (reached or (optimized and _has_gradients(listing.modules))):
        return
    for layer in layers.values():
        layer.lora.injection.training_checked = True
    unchanged = {name: layer for name, layer in layers.items() if layer.is_initial()}
    unreached = [name for name, layer in unchanged.items() if layer not in reached]
    if unreached:
        in_segments = [name for name in unreached if layers[name].lora.in_segment]
        _warn_of_unreached(unreached, in_segments, len(layers), stacklevel)
    elif not optimized and len(unchanged) == len(layers):
        _warn_of_optimizer(stacklevel)


def _has_gradients(modules: NamedModules) -> bool:
    own = (parameter for _, module in modules for parameter in module._parameters.values() if parameter is not None)
    return any(parameter.requires_grad and parameter.grad is not None for parameter in own)


def _warn_of_unreached(names: list[str], in_segments: list[str], among: int, stacklevel: int) -> None:
    others = [name for name in names if name not in in_segments]
    text = f"lightning_lora: no gradient has reached the adapters of {len(names)} of {among} layers: {_shown(names)}."
    if in_segments:
        text += f" {_shown(in_segments) if others else 'They'} ran in {REENTRANT}. {REENTRANT_REMEDY}."
    if others:
        text += (
            f" {f'As to {_shown(others)}: either' if in_segments else 'Either'} nothing has used these layers yet "
            "(parts that few inputs reach, the network of another optimizer), or they are cut off from the loss "
            "(detach, no_grad), or the model reads their weight without calling them, which the adapter cannot follow. "
            f"Leave out layers that are never trained: exclude_modules={others[:SHOWN]!r}."
        )
    warnings.warn(text, stacklevel=stacklevel)


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _warn_of_optimizer(stacklevel: int) -> None:
    warnings.warn(
        "lightning_lora: gradients reach the adapters, but none of them has changed. An optimizer that was built "
        "before inject does not hold them: build it afterwards, from model.parameters(). Before the first step of an "
        "optimizer this is no error.",
        stacklevel=stacklevel,
    )


def explain_missing_gradients(exception: BaseException, model: nn.Module) -> None:
    """Extend torch's error about a loss without gradients where adapters are its reason. In place.

    Args:
        exception: of a training step.
        model: that was trained.
    """
    if "does not require grad" not in str(exception):
        return
    layers = adapted_layers(model).values()
    states = [layer.lora for layer in layers]
    if any(state.merged for state in states):
        exception.args = (
            f"{exception}. The adapters are merged, and merged adapters get no gradients: something called merge() "
            "before this training step; call unmerge(model) first, or merge in `with merged(model):` around the "
            "evaluation.",
        )
    elif any(state.in_segment for state in states):
        exception.args = (f"{exception}. The adapters ran in {REENTRANT}. {REENTRANT_REMEDY}.",)
    elif layers and not any(factor.requires_grad for layer in layers for factor in layer.factors()):
        exception.args = (
            f"{exception}. The adapters are frozen: something set requires_grad=False after they were injected, as a "
            "freeze() in a hook does. Leave that call out; injection has frozen the base already.",
        )
