"""Log the adapter's options among the hyper-parameters of a run. Checkpoints do not get them.

Lightning gives `hparams_initial` to the loggers in one call, right after the hooks of fit start, and puts `hparams`
into checkpoints. So the options are added to `hparams_initial` for that call. A call of our own would come too late:
TensorBoard compares runs by the first call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import LoRAConfig, plain_number

INITIAL, LOGS = "_hparams_initial", "_log_hyperparams"  # attributes of a LightningModule

Plain = bool | int | float | str | None


def as_hyperparameters(config: LoRAConfig, **own: Any) -> dict[str, Plain]:
    """Return options under the names `lora/r` and so on. Lists become text with commas, mappings JSON."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__} | own
    return {f"lora/{name}": _plain(value) for name, value in options.items()}


class LoggedOptions:
    """Options that a LightningModule has among its hyper-parameters, until Lightning has logged them."""

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None  # the module's own, while it has others

    def add(self, module: Any, options: Mapping[str, Plain]) -> None:
        """Add options to those that the module logs next. In place, until `remove`."""
        if self._before is not None:
            return
        self._before = {name: vars(module)[name] for name in (INITIAL, LOGS) if name in vars(module)}
        initial = module.hparams_initial if getattr(module, LOGS) else {}
        if isinstance(initial, dict):  # Lightning's own; a config of omegaconf may refuse new keys
            initial.update(options)
        else:
            initial = {**initial, **options}
        vars(module).update({INITIAL: initial, LOGS: True})

    def remove(self, module: nn.Module) -> None:
        """Give the module its own hyper-parameters back. In place."""
        before, self._before = self._before, None
        if before is not None:
            for name in (INITIAL, LOGS):
                vars(module).pop(name, None)
            vars(module).update(before)


def _plain(value: Any) -> Plain:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else plain_number(value)
