"""Warn of adapters that training does not reach: layers without a gradient, and an optimizer without the adapters.

A hook on each B notes its first gradient and then removes itself, and optimizers' steps are noted. The notes are looked
at once a layer: in a Trainer after the first batch in which the layer's optimizer steps, or before it loads a
checkpoint, as a finder of Lightning's does after its trials; and at the first merge or save after a gradient in a plain
loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..nn.adapted_weights import AdaptedWeights, adapted_layers
from ..nn.gradient_checkpointing import REENTRANT, REENTRANT_REMEDY
from .adapted_model import Listing
from .optimizer_steps import note_steps, stop_noting

SHOWN = 5  # names in a warning
TOGGLED = "_param_requires_grad_state"  # attribute in which LightningModule.toggle_optimizer keeps requires_grad


def note_gradient(layer: AdaptedWeights) -> None:
    """Let a layer note when the first gradient arrives at B, its last factor. Optimizers' steps are noted too."""
    state = layer.lora
    note_steps(state.injection)

    def note(parameter: torch.Tensor) -> None:
        state.gradient_arrived = True
        hook.remove()

    hook = layer.factors()[-1].register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]


def warn_of_untrained(
    listing: Listing,
    *,
    held: Sequence[Collection[int]] | None = None,
    held_alone: bool = False,
    stacklevel: int = 4,
) -> None:
    """Warn once a layer, after training has begun, of adapters that training does not reach.

    Args:
        listing: of any module that holds adapted layers.
        held: for each optimizer of a Trainer, the ids of the parameters that it trains. A layer whose optimizer has not
            stepped yet is not looked at. None in a plain loop, whose optimizers are not known.
        held_alone: a layer that none of these optimizers trains is not looked at either.
        stacklevel: of the warning, so that it shows the user's line.
    """
    layers = {name: layer for name, layer in listing.layers.items() if not layer.lora.training_checked}
    layers = {name: layer for name, layer in layers.items() if layer.factors()[-1].requires_grad}
    steps = {id(record): record.steps for record in (layer.lora.injection for layer in layers.values())}.values()
    stepped, in_all = set().union(*(each.on_gradients for each in steps)), set().union(*(each.all for each in steps))
    reached = {each for each in layers.values() if each.lora.gradient_arrived or each.factors()[-1].grad is not None}
    if held is not None:
        layers = _of_stepped(layers, held, stepped, held_alone)
    elif not reached and not _holds_factor(stepped, layers):
        return
    unchanged = {name: layer for name, layer in layers.items() if layer.is_initial()}
    unreached = [name for name, layer in unchanged.items() if layer not in reached]
    all_have_gradients = not unreached and len(unchanged) == len(layers)
    optimized = held is not None or not all_have_gradients or _holds_factor(in_all, layers)
    if not optimized and not _holds_base(in_all, listing):
        return  # before the first step of an optimizer
    _mark_checked(layers, listing)
    if unreached:
        in_segments = [name for name in unreached if layers[name].lora.in_segment]
        _warn_of_unreached(unreached, in_segments, len(layers), stacklevel)
    elif not optimized:
        _warn_of_optimizer(stacklevel)


def _of_stepped(
    layers: Mapping[str, AdaptedWeights], held: Sequence[Collection[int]], stepped: set[int], held_alone: bool
) -> dict[str, AdaptedWeights]:
    """Return the layers that the optimizers which have stepped train, and unless held_alone those that none trains."""
    have_stepped = [not stepped.isdisjoint(parameters) for parameters in held]
    if not any(have_stepped):
        return {}
    waiting = {each for of, has in zip(held, have_stepped, strict=True) if not has for each in of}
    last = {name: id(layer.factors()[-1]) for name, layer in layers.items()}
    looked_at = {each for of in held for each in of} if held_alone else set(last.values())
    return {name: layer for name, layer in layers.items() if last[name] in looked_at - waiting}


def _holds_factor(stepped: set[int], layers: Mapping[str, AdaptedWeights]) -> bool:
    return any(id(factor) in stepped for layer in layers.values() for factor in layer.factors())


def _holds_base(stepped: set[int], listing: Listing) -> bool:
    own = (parameter for _, module in listing.modules for parameter in module._parameters.values())
    return any(id(parameter) in stepped for parameter in own)


def _mark_checked(layers: Mapping[str, AdaptedWeights], listing: Listing) -> None:
    for layer in layers.values():
        layer.lora.training_checked = True
    if layers and all(layer.lora.training_checked for layer in listing.layers.values()):
        for layer in layers.values():
            stop_noting(layer.lora.injection)


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
        "before inject does not hold them: build it afterwards, from model.parameters().",
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
    elif layers and not any(_is_trainable(factor, model) for layer in layers for factor in layer.factors()):
        exception.args = (
            f"{exception}. The adapters are frozen: something set requires_grad=False after they were injected, as a "
            "freeze() in a hook does. Leave that call out; injection has frozen the base already.",
        )


def _is_trainable(factor: nn.Parameter, model: nn.Module) -> bool:
    """Return whether a factor is trained, now or when LightningModule.untoggle_optimizer gives its state back."""
    toggled: Mapping[nn.Parameter, bool] = vars(model).get(TOGGLED) or {}
    return bool(toggled.get(factor, factor.requires_grad))
