"""Let Lightning's progress bar say "Validation, merged" while an evaluation runs merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..nn.adapted_weights import AdaptedWeights

DESCRIPTIONS = tuple(f"{stage}_description" for stage in ("sanity_check", "validation", "test", "predict"))


def when_merged(layers: Iterable[AdaptedWeights]) -> str:
    """Return what merge does to a module: "merged", "partly merged", or "" where all layers stay factored."""
    stays = [bool(layer.unmergeable_reason()) for layer in layers]
    return "" if all(stays) else "partly merged" if any(stays) else "merged"


def describe_as_merged(trainer: Any, how: str) -> None:
    """Let the progress bar say how evaluations run. In place.

    The bar's descriptions are properties, which only a class can replace. So the bar gets a subclass until `how` is "".

    Args:
        trainer: the Trainer.
        how: the result of when_merged; "" gives the bar its own descriptions back.
    """
    bar = trainer.progress_bar_callback
    if bar is None or getattr(bar, "lora_how", "") == how or not hasattr(bar, DESCRIPTIONS[0]):
        return
    own = type(bar).__base__ if hasattr(bar, "lora_how") else type(bar)
    bar.__class__ = _described(own, how) if how else own


def _described(own: Any, how: str) -> type:
    """Return a subclass of a progress bar's own class, whose descriptions end with `how`."""

    def ending(name: str) -> property:
        return property(lambda self: f"{getattr(super(cls, self), name)}, {how}")

    space = {"__module__": own.__module__, "lora_how": how, **{name: ending(name) for name in DESCRIPTIONS}}
    cls = type(own.__name__, (own,), space)
    return cls
