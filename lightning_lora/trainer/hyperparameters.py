"""Log the adapter's options among the hyper-parameters of a run. Checkpoints do not get them.

Lightning gives `hparams_initial` to the loggers in one call, right after the hooks of fit start, and puts `hparams`
into checkpoints. So the options are added to `hparams_initial`. A call of our own would come too late: TensorBoard
compares runs by the first call.
"""

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


def log_options(module: Any, options: Mapping[str, Plain]) -> None:
    """Add options to the hyper-parameters that a LightningModule's loggers get. In place."""
    initial = module.hparams_initial if module._log_hyperparams else {}
    if isinstance(initial, dict):  # Lightning's own, a copy; a config of omegaconf may refuse new keys
        initial.update(options)
    else:
        initial = {**initial, **options}
    module._hparams_initial, module._log_hyperparams = initial, True


def _plain(value: Any) -> Plain:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else plain_number(value)
