"""The callbacks that one writes first, the negative controls of many tests: a test that they pass shows nothing.

A damage is how far a number is from the right one, or 1 where something fails.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.nn.lora_layer import LoRALayer
from support.runs import TARGETS
from support.training import Data, Net, make_trainer


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
                layer.adapted_weight().add_(sign * layer.lora.spec.scaling * layer.lora_B @ layer.lora_A)
                layer.lora_active = sign < 0


# --- for harm that NaiveCallback does not take ---


class SavesAll(NaiveCallback):
    """Leaves checkpoints as they are, as a full kind of checkpoint would."""

    on_save_checkpoint = L.Callback.on_save_checkpoint


class MergesEachName(NaiveCallback):
    """Goes through the names of modules, of which one module may have two."""

    @torch.no_grad()
    def _add(self, model: nn.Module, sign: int) -> None:
        for _, layer in model.named_modules(remove_duplicate=False):
            if self.merged_eval and isinstance(layer, LoRALayer):
                layer.adapted_weight().add_(sign * layer.lora.spec.scaling * layer.lora_B @ layer.lora_A)
                layer.lora_active = sign < 0


class ReplacesData(NaiveCallback):
    """Puts a new tensor into the parameter."""

    @torch.no_grad()
    def _add(self, model: nn.Module, sign: int) -> None:
        for layer in model.modules():
            if isinstance(layer, LoRALayer):
                layer.weight.data = layer.weight + sign * layer.lora.spec.scaling * layer.lora_B @ layer.lora_A
                layer.lora_active = sign < 0


class FiltersInAClosure(NaiveCallback):
    """Replaces the module's own hook, as a callback's is skipped for weights only, by a function made on the spot."""

    on_save_checkpoint = L.Callback.on_save_checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        module: Any = pl_module

        def keep_factors(checkpoint: dict[str, Any]) -> None:
            state = pl_module.state_dict()
            checkpoint["state_dict"] = {name: value for name, value in state.items() if "lora_" in name}

        module.on_save_checkpoint = keep_factors


class InjectsWhenItMerges(L.Callback):
    """Makes the factors when they are first needed."""

    def __init__(self, *, target_modules: list[str], r: int, **options: Any) -> None:
        self.targets, self.r = target_modules, r

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in self.targets:
            layer: Any = pl_module.get_submodule(name)
            if not hasattr(layer, "lora_A"):
                layer.lora_A = nn.Parameter(torch.randn(self.r, layer.in_features))
                layer.lora_B = nn.Parameter(torch.randn(layer.out_features, self.r))
                layer.forward = types.MethodType(_with_adapter(layer.forward), layer)


class SavesItsConfig(NaiveCallback):
    """Puts the config into the checkpoint as the object that it is."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lora"] = self.config


class Peft(L.Callback):
    """Injects with PEFT, which replaces modules and renames what they hold."""

    def __init__(self, *, target_modules: list[str], **options: Any) -> None:
        from peft import LoraConfig

        options = {name: value for name, value in options.items() if name not in ("merged_eval", "save")}
        self.config = LoraConfig(target_modules=target_modules, **options)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from peft import inject_adapter_in_model

        if not any("lora_" in name for name, _ in pl_module.named_parameters()):
            inject_adapter_in_model(self.config, pl_module)


class PatchesForward(L.Callback):
    """Adds the adapter in a function that it puts in place of a layer's forward."""

    def __init__(self, *, target_modules: list[str], r: int, **options: Any) -> None:
        self.targets, self.r = target_modules, r

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for name in self.targets:
            layer: Any = pl_module.get_submodule(name)
            layer.lora_A = nn.Parameter(torch.randn(self.r, layer.in_features))
            layer.lora_B = nn.Parameter(torch.randn(layer.out_features, self.r))
            layer.forward = types.MethodType(_with_adapter(layer.forward), layer)


def _with_adapter(forward: Callable[..., Any]) -> Callable[..., Any]:
    def adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = forward(x) + x @ layer.lora_A.T @ layer.lora_B.T
        return result

    return adapted


# --- harm ---

Make = Callable[..., L.Callback]
Damage = Callable[[Make, Path], float]
OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}
RANDOM = {"init_lora_weights": False}
RIGHT, WRONG = 1e-5, 1e-3


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def fit(path: Path, model: Net, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(path, *callbacks, **{"max_epochs": 3} | options)
    trainer.fit(model, Data())
    return trainer


def fails(act: Callable[[], Any], *errors: type[Exception]) -> float:
    try:
        act()
    except errors:
        return 1.0
    return 0.0


def assert_harms_naive_alone(damage: Damage, naive: Make, ours: Make, path: Path) -> None:
    """The case harms the callback one writes first, so that it tells something, and not ours."""
    assert damage(ours, path / "ours") <= RIGHT
    assert damage(naive, path / "naive") > WRONG
