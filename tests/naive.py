"""The callback that one writes first, the negative control of many tests: a test that it passes shows nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.lora_layer import adapted_layers


class NaiveCallback(L.Callback):
    """Merges at on_validation_start, unmerges by subtraction at on_validation_end, filters in on_save_checkpoint.

    Layers and injection are the package's, so that only these three choices are put to the test.
    """

    def __init__(self, *, merged_eval: bool = True, **options: Any) -> None:
        self.config, self.merged_eval = LoRAConfig(**options), merged_eval

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        inject(pl_module, self.config)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add(pl_module, 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add(pl_module, -1)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if "lora_" in name}

    @torch.no_grad()
    def _add(self, model: L.LightningModule, sign: int) -> None:
        if self.merged_eval:
            for layer in adapted_layers(model).values():
                layer.weight += sign * layer.lora.spec.scaling * layer.lora_B @ layer.lora_A
                layer.lora_active = sign < 0
