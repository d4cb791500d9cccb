"""The check of a model's base, for a module where the package takes what a call has opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.exchange import take
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.live_state import open_state


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any]) -> None:
    take.check_fingerprint(open_state(open_model(model, "test")), expected)
