"""Warn of adapters that training does not reach.

In a Trainer, LoRACallback looks for missing gradients before an optimizer's first step. A loop without a Trainer has no
such moment. There the adapters' values are looked at when the model is merged or saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..distributed.sharding import is_spread
from ..nn.adapted_weights import AdaptedWeights, adapted_layers
from ..nn.gradient_checkpointing import REENTRANT, REENTRANT_REMEDY
from .adapted_model import Listing

SHOWN = 5  # names in a warning


def warn_of_untrained(listing: Listing, *, stacklevel: int = 3) -> None:
    """Warn of adapters that still have their first values, beside others that have not. Once a layer.

    A sharded adapter is not looked at: this rank's part of it may be empty, or not trained yet.

    Args:
        listing: of any module that holds adapted layers.
        stacklevel: of the warning, so that it shows the user's line.
    """
    layers = {name: layer for name, layer in listing.layers.items() if not is_spread(layer.factors()[-1])}
    unchecked = {name: layer for name, layer in layers.items() if not layer.lora.training_checked}
    for layer in unchecked.values():
        layer.lora.training_checked = not layer.is_initial()
    last = {name: layer.factors()[-1] for name, layer in unchecked.items() if not layer.lora.training_checked}
    unchanged = [name for name, factor in last.items() if factor.requires_grad and factor.grad is None]
    if unchanged and any(layer.lora.training_checked for layer in layers.values()):
        warn_of_layers("training has changed other adapters, and not those", layers, unchanged, stacklevel + 1)


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
