"""Counts the full walks of a model: calls that visit every module, parameter, buffer or state of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from lightning_lora.model import adapted_model

METHODS = ("named_modules", "modules", "named_parameters", "parameters", "named_buffers", "buffers", "state_dict")


@contextmanager
def counted_walks(*models: nn.Module) -> Iterator[Counter[str]]:
    """Count the walks of these modules inside, by the method that was called and the line that called it.

    A walk that torch makes as a part of another one is not counted: named_parameters calls named_modules.
    """
    walks: Counter[str] = Counter()
    whole = {id(model) for model in models}
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(nn.Module, name, _counting(getattr(nn.Module, name), whole, walks))
        patch.setattr(adapted_model, "list_places", _counting(adapted_model.list_places, whole, walks))
        yield walks


def _counting(original: Callable[..., Any], whole: set[int], walks: Counter[str]) -> Callable[..., Any]:
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if id(self) in whole and caller.f_code.co_filename != sys.modules[nn.Module.__module__].__file__:
            walks[f"{original.__name__} in {caller.f_code.co_filename}:{caller.f_lineno}"] += 1
        return original(self, *args, **kwargs)

    return counting
