"""The adapter's options as hyper-parameters of a run; private/lightning.py adds them to those that loggers get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import LoRAConfig, plain_number

Plain = bool | int | float | str | None


def as_hyperparameters(config: LoRAConfig, **own: Any) -> dict[str, Plain]:
    """Return options under the names `lora/r` and so on. Lists become text with commas, mappings JSON."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__} | own
    return {f"lora/{name}": _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Plain:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else plain_number(value)
