"""Runs with LoRACallback that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers import Data, Net, make_trainer

from lightning_lora import LoRACallback, is_merged

TARGETS = ["body.0", "body.3", "head"]
BATCHES = 3


def lora(**options: Any) -> LoRACallback:
    defaults: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    return LoRACallback(**defaults | options)


class Steps(Net):
    """Notes in which step it was merged; `fault` is raised once, at the second batch of a step of the name `faulty`."""

    fault: BaseException | None = None
    faulty = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self._current_fx_name, is_merged(self)))
        if self._current_fx_name == self.faulty and self.fault is not None and len(self.seen) % BATCHES == 2:
            fault, self.fault = self.fault, None
            raise fault
        return super().forward(x)

    def when(self, merged: bool) -> set[str]:
        return {name for name, found in self.seen if found is merged}


def run(trainer: L.Trainer, stage: str, model: L.LightningModule) -> None:
    getattr(trainer, stage)(model, Data(BATCHES), **{"verbose": False} if stage in ("validate", "test") else {})


def trained(path: Path, model: Net, *callbacks: L.Callback, **options: Any) -> Net:
    """Fit; where the model is not injected yet, its adapters start from the same numbers each time."""
    torch.manual_seed(0)
    make_trainer(path, *callbacks, **options).fit(model.train(), Data(BATCHES))
    return model
