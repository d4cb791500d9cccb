"""Warn of adapters that training does not reach, and of attached ones that no forward reads.

In a Trainer, LoRACallback looks for missing gradients before an optimizer's first step. A loop without a Trainer has no
such moment. There the adapters' values are looked at when the model is merged or saved.

An attached adapter has no gradient, so its factors note that a forward has read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..distributed.sharding import is_spread
from ..nn.adapted_module import adapted_layers
from ..nn.adapted_weights import AdaptedWeights
from ..nn.gradient_checkpointing import REENTRANT, REENTRANT_REMEDY
from ..notices import warn
from .adapted_model import Listing

SHOWN = 5  # names in a warning


def warn_of_untrained(listing: Listing, *, stacklevel: int = 3) -> None:
    """Warn of adapters that still have their initial values, where others have not. Once a layer.

    Also warn of attached adapters that no forward has read, where others were read.

    A sharded adapter is not looked at: this rank's part of it may be empty, or not trained yet.

    Args:
        listing: of any module that holds adapted layers.
        stacklevel: of the warning, so that it shows the user's line.
    """
    layers = {name: layer for name, layer in listing.layers.items() if not is_spread(layer.trained_tensors()[-1])}
    unchecked = {name: layer for name, layer in layers.items() if not layer.lora.training_checked}
    for layer in unchecked.values():
        layer.lora.training_checked = not layer.is_initial()
    last = {name: layer.trained_tensors()[-1] for name, layer in unchecked.items() if not layer.lora.training_checked}
    unchanged = [name for name, factor in last.items() if factor.requires_grad and factor.grad is None]
    if unchanged and any(layer.lora.training_checked for layer in layers.values()):
        warn_of_layers("training has changed other adapters, and not those", layers, unchanged, stacklevel + 1)
    warn_of_unread(listing, has_run=False)


def warn_of_layers(fact: str, layers: Mapping[str, AdaptedWeights], names: Sequence[str], stacklevel: int = 2) -> None:
    """Warn of layers that training does not reach: why it may be so, and what to do. They are not looked at again.

    Args:
        fact: the beginning of the message.
        layers: all adapted layers, by name.
        names: of those to warn of.
        stacklevel: of the warning.
    """
    for name in names:
        layers[name].lora.training_checked = True
    in_segments = [name for name in names if layers[name].lora.in_segment]
    others = [name for name in names if name not in in_segments]
    text = f"lightning_lora: {fact} of {len(names)} of {len(layers)} layers: {_shown(names)}."
    if in_segments:
        text += f" {_shown(in_segments) if others else 'They'} ran in {REENTRANT}. {REENTRANT_REMEDY}."
    if others:
        text += (
            f" {f'As to {_shown(others)}: either' if in_segments else 'Either'} nothing has used these layers yet "
            "(parts that few inputs reach), or they are cut off from the loss (detach, no_grad), or the model reads "
            "their weight without calling them, which the adapter cannot follow. "
            f"Leave out layers that are never trained: exclude_modules={others[:SHOWN]!r}."
        )
    warnings.warn(text, stacklevel=stacklevel)


def warn_of_unread(listing: Listing, *, has_run: bool) -> None:
    """Warn of layers whose attached adapters no forward has read since they were attached. Once a layer.

    A merged layer is left out: a forward reads W'.

    Args:
        listing: of any module that holds adapted layers.
        has_run: a forward of the whole model has run; else that is known where other layers were read.
    """
    factored = {name: layer for name, layer in listing.all_layers.items() if layer.lora.undo is None}
    packed = {name: layer.lora.attached for name, layer in factored.items() if layer.lora.attached is not None}
    unread = [name for name, each in packed.items() if not each.read]
    if not unread or not (has_run or len(unread) < len(packed)):
        return
    for name in unread:
        packed[name].read = True
    attached = sorted({each for name in unread for each in packed[name].shares})
    warn(
        f"lightning_lora: no forward has read what is attached ({', '.join(map(repr, attached))}) to {len(unread)} of "
        f"{len(packed)} layers: {_shown(unread)}. Either nothing has used these layers yet (parts that few inputs "
        "reach), or the model reads their weight without calling them, which the adapter cannot follow: there it acts "
        "in a merged model and not in a factored one. Call the layer, read its weight as self.layer.weight in a method "
        "of the module that holds it, or evaluate inside `with merged(model):`."
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def explain_missing_gradients(exception: BaseException, model: nn.Module) -> None:
    """Extend torch's error about a loss without gradients where merged adapters are its reason. In place.

    Args:
        exception: of a training step.
        model: that was trained.
    """
    if "does not require grad" in str(exception) and any(each.lora.merged for each in adapted_layers(model).values()):
        exception.args = (
            f"{exception}. The adapters are merged, and merged adapters get no gradients: something called merge() "
            "before this training step; call unmerge(model) first, or merge in `with merged(model):` around the "
            "evaluation.",
        )
