"""Runs with LoRACallback, checks of what must hold after a run, and the same run evaluated unmerged for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_lora import LoRACallback, disable_adapter, is_merged
from lightning_lora.nn.lora_layer import LoRALayer
from support.runs.lightning_versions import EMAWeightAveraging, WeightAveraging
from support.runs.training import Data, Net, assert_same_tensors, make_trainer, outputs, weights

TARGETS = ["body.0", "body.3", "head"]
BATCHES = 3


def lora(**options: Any) -> LoRACallback:
    defaults: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    return LoRACallback(**defaults | options)


class Steps(Net):
    """Notes in which steps it was merged. Raises `fault` once, at the second batch of the step named `faulty`."""

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
    """Fit a model. If the callback injects it, its adapters start from the same numbers each time."""
    torch.manual_seed(0)
    make_trainer(path, *callbacks, **options).fit(model.train(), Data(BATCHES))
    return model


# --- the same run evaluated merged and unmerged ---

EVALUATIONS = ("validation", "test", "predict")


def lora_with_effect(**options: Any) -> LoRACallback:
    """A callback whose adapter has an effect from the first batch on."""
    defaults: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False}
    return LoRACallback(**defaults | options)


class Watched(Net):
    """Notes (stage, merged, loss) of each step in `seen`."""

    def note(self, stage: str, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append((stage, is_merged(self), loss.item()))
        return loss

    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        return self.note("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, *args: Any) -> None:
        self.log("val_loss", self.note("validation", batch))

    def test_step(self, batch: Any, batch_idx: int, *args: Any) -> None:
        self.log("test_loss", self.note("test", batch))

    def predict_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        self.note("predict", batch)
        return self(batch[0])


Run = Callable[[Path, Net, LoRACallback], Any]


def compare(
    path: Path,
    run: Run,
    make: Callable[[], Net] = Watched,
    *,
    always: bool = True,
    base_stays: bool = True,
    tolerance: float = 1e-5,
    **options: Any,
) -> Net:
    """Run twice, evaluated merged and unmerged, and check: equal metrics, training bit for bit, the base untouched.

    Args:
        path: a folder that the runs may write to.
        run: called with a path, a model and a LoRACallback.
        make: builds the model.
        always: every evaluation batch is merged. False under a tuner, which removes the Trainer's callbacks.
        base_stays: the base is not built late, cast, averaged or trained by others.
        tolerance: relative difference of the metrics.
        options: of LoRACallback.
    """
    models, results = {}, {}
    for merged_eval in (True, False):
        torch.manual_seed(0)
        models[merged_eval] = model = make()
        before = base_weights(model) if base_stays else None
        results[merged_eval] = run(path / str(merged_eval), model, lora_with_effect(merged_eval=merged_eval, **options))
        assert_as_found(model, before)
    merged, factored = models[True], models[False]
    assert_same_numbers(merged.seen, factored.seen, tolerance)
    evaluated = {was for stage, was, _ in merged.seen if stage in EVALUATIONS}
    assert True in evaluated
    assert not always or False not in evaluated
    assert not any(was for stage, was, _ in [*factored.seen, *merged.seen] if stage == "train")
    assert not any(was for _, was, _ in factored.seen)
    if results[True] is not None:
        assert results[True] == pytest.approx(results[False], rel=tolerance, abs=1e-6)
    assert_same_tensors(weights(merged), weights(factored))
    if base_stays:
        assert_adapter_matters(merged)
    return merged


def assert_same_numbers(found: list[Any], expected: list[Any], tolerance: float = 1e-5) -> None:
    assert [stage for stage, _, _ in found] == [stage for stage, _, _ in expected]
    assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in expected], rel=tolerance)


def assert_adapter_matters(model: nn.Module) -> None:
    """Check that the adapter changes metrics by a thousand times the tolerance of `compare`."""
    with disable_adapter(model):
        base = outputs(model)
    assert (outputs(model) - base).abs().max() > 1e-2


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters but the adapters'."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.rpartition(".")[2].startswith("lora_")}


def assert_as_found(model: nn.Module, before: dict[str, torch.Tensor] | None) -> None:
    """Check that a model is unmerged, that its base has the bits of before (unless None), and that no hook is left."""
    assert not is_merged(model)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    assert layers, "nothing was injected"
    assert all(
        layer.lora_active and layer.lora.undo is None and not layer.lora.injection.in_training_batch for layer in layers
    )
    assert not any(layer._forward_hooks for layer in layers)
    if before is not None:
        assert_same_tensors(base_weights(model), before)


class At(L.Callback):
    """Calls act(trainer, module) in one hook, if when(trainer) is true."""

    def __init__(self, hook: str, act: Callable[[Any, Any], None], when: Callable[[Any], bool] = lambda trainer: True):
        self.hook = hook

        def call(trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if when(trainer):
                act(trainer, pl_module)

        setattr(self, hook, call)


# --- modules and callbacks of particular runs ---


class Manual(Watched):
    """Manual optimization with one optimizer for the body's adapters and one for the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(self.note("train", batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(filter(lambda p: p.requires_grad, self.body.parameters()), lr=0.05),
            torch.optim.SGD(self.head.parameters(), lr=0.1),
        ]


class Logs(Watched):
    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss.detach())
        return loss


class Backboned(Logs):
    """A module as BackboneFinetuning needs it: with a backbone, and with an optimizer of trainable parameters only."""

    @property
    def backbone(self) -> torch.nn.Module:
        return self.body

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.02)


class BrokenError(Exception):
    pass


# --- averaging ---

SCALING = 2.0
SWAPPERS: dict[str, Callable[[], L.Callback]] = {
    "mean": lambda: WeightAveraging(),
    "mean without buffers": lambda: WeightAveraging(use_buffers=False),
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema every second step": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=2),
    "ema from step 4": lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=4),
    "ema each epoch": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
}


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2)


def reference_loss(state: dict[str, torch.Tensor]) -> float:
    """Net's loss on the validation data in float64, from W, A and B, without this package."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = s[f"{name}.weight"]
        if f"{name}.lora_A" in s:
            weight = weight + SCALING * s[f"{name}.lora_B"] @ s[f"{name}.lora_A"]
        return F.linear(x, weight, s[f"{name}.bias"])

    s = {name: value.double() for name, value in state.items()}
    losses = []
    for x, y in Data().val_dataloader():
        hidden = linear(x.double(), "body.0")
        mean, var = s["body.1.running_mean"], s["body.1.running_var"]
        hidden = F.batch_norm(hidden, mean, var, s["body.1.weight"], s["body.1.bias"]).relu()
        losses.append(F.cross_entropy(linear(linear(hidden, "body.3").relu(), "head"), y).item())
    return sum(losses) / len(losses)
