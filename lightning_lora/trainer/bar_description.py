"""Lightning's progress bar, which says "Validation, merged" while an evaluation runs merged."""

from __future__ import annotations

from typing import Any

DESCRIPTIONS = tuple(f"{stage}_description" for stage in ("sanity_check", "validation", "test", "predict"))


def describe_as_merged(trainer: Any, merged: bool) -> None:
    """Let the progress bar say that evaluations run merged, or what its own class says again. In place.

    The descriptions are properties, which only a class can replace: the bar gets a subclass of its own for as long.
    """
    bar = trainer.progress_bar_callback
    if bar is None or isinstance(bar, _Merged) == merged or not hasattr(bar, DESCRIPTIONS[0]):
        return
    own = type(bar)
    bar.__class__ = type(own.__name__, (_Merged, own), {"__module__": own.__module__}) if merged else own.__bases__[1]


class _Merged:
    """What comes before a progress bar's own class."""


def _add_description(name: str) -> None:
    setattr(_Merged, name, property(lambda self: f"{getattr(super(_Merged, self), name)}, merged"))


for _name in DESCRIPTIONS:
    _add_description(_name)
