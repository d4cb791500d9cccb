"""Runs of a Trainer that are compared with the same run evaluated unmerged, and what must hold after each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Net, assert_same_tensors, outputs, weights
from torch import nn

from lightning_lora import LoRACallback, disable_adapter, is_merged
from lightning_lora.base import LoRALayer

TARGETS = ["body.0", "body.3", "head"]
EVALUATIONS = ("validation", "test", "predict")


def lora(**options: Any) -> LoRACallback:
    """A callback whose adapter has an effect from the first batch on."""
    return LoRACallback(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False} | options)


class Watched(Net):
    """Notes (stage, merged, loss) of each step in `seen`."""

    def note(self, stage: str, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append((stage, is_merged(self), loss.item()))
        return loss

    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> torch.Tensor:
        return self.note("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, *args: Any) -> None:
        self.log("val_loss", self.note("validation", batch))

    def test_step(self, batch: Any, batch_idx: int, *args: Any) -> None:
        self.log("test_loss", self.note("test", batch))

    def predict_step(self, batch: Any, batch_idx: int, *args: Any) -> torch.Tensor:
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
    """Run evaluated merged and unmerged: the same numbers, the same training bit for bit, the base untouched.

    Args:
        path: where the runs may write.
        run: what to do with a path, a model and a LoRACallback.
        make: the model.
        always: every evaluation batch is merged; not so under a finder, which takes the Trainer's callbacks out.
        base_stays: the base is not built late, cast, averaged or trained by others.
        tolerance: relative difference of the numbers.
        options: of LoRACallback.
    """
    models, results = {}, {}
    for merged_eval in (True, False):
        torch.manual_seed(0)
        models[merged_eval] = model = make()
        before = base_weights(model) if base_stays else None
        results[merged_eval] = run(path / str(merged_eval), model, lora(merged_eval=merged_eval, **options))
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
    """A thousand times the tolerance of compare, so that its numbers tell the adapter from its absence."""
    with disable_adapter(model):
        base = outputs(model)
    assert (outputs(model) - base).abs().max() > 1e-2


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters but the adapters'."""
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[2] not in ("lora_A", "lora_B")
    }


def assert_as_found(model: nn.Module, before: dict[str, torch.Tensor] | None) -> None:
    """Unmerged, the live base bit for bit as before (unless None), nothing left on."""
    assert not is_merged(model)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    assert layers, "nothing was injected"
    assert all(layer.lora_active and not layer.lora_kept and layer.lora_dropping is None for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
    if before is not None:
        assert_same_tensors(base_weights(model), before)


class At(L.Callback):
    """Calls act(trainer, module) in one hook, when(trainer) permitting."""

    def __init__(self, hook: str, act: Callable[[Any, Any], None], when: Callable[[Any], bool] = lambda trainer: True):
        self.hook = hook

        def call(trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if when(trainer):
                act(trainer, pl_module)

        setattr(self, hook, call)
