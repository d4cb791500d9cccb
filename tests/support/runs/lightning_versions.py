"""Features that the oldest supported Lightning does not have yet, in one place.

Weight averaging, and `weights_only=` of fit, validate, test and predict, came with Lightning 2.6. Tests that need
weight averaging are marked with `weight_averaging`. Where Lightning lacks it they are not collected
(tests/conftest.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
from lightning.pytorch import callbacks

HAS_WEIGHT_AVERAGING = hasattr(callbacks, "WeightAveraging")

if TYPE_CHECKING or HAS_WEIGHT_AVERAGING:
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
else:
    WeightAveraging = EMAWeightAveraging = None

# Given to what loads a checkpoint: plain types and tensors only, or objects too, where Lightning asks which.
PLAIN_TYPES_ONLY: dict[str, Any] = (
    {"weights_only": True} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}
)
ANY_OBJECTS: dict[str, Any] = dict.fromkeys(PLAIN_TYPES_ONLY, False)

weight_averaging = pytest.mark.weight_averaging


def averaging(values: Iterable[Any]) -> list[Any]:
    """Mark values for parametrize as needing weight averaging. A tuple is the values of several parameters."""
    return [pytest.param(*v if isinstance(v, tuple) else (v,), marks=weight_averaging) for v in values]


__all__ = [
    "ANY_OBJECTS",
    "HAS_WEIGHT_AVERAGING",
    "PLAIN_TYPES_ONLY",
    "EMAWeightAveraging",
    "WeightAveraging",
    "averaging",
    "weight_averaging",
]
