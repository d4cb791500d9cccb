"""Each check is passed by this package, and failed by a mutation of it and by the callback one writes first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAError, is_merged, merge
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint as write
from lightning_lora.model.patches import unpatch
from lightning_lora.nn.exact_merge import Undo
from lightning_lora.trainer.evaluation import merge_to_evaluate
from support.lightning_versions import EMAWeightAveraging, weight_averaging
from support.naive import NaiveCallback
from support.runs import BATCHES, TARGETS, run
from support.training import Data, Net, make_trainer, tensors

OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 16, "target_modules": TARGETS}
Make = Callable[..., L.Callback]


def refuted(check: Callable[..., None], make: Make, *args: Any) -> None:
    """The check fails, by the assertion that bears its name."""
    with pytest.raises(AssertionError, match=check.__name__):
        check(make, *args)


# --- unmerge is bit-exact ---


def base_weights_stay(make: Make, path: Path) -> None:
    model, plain = Net(width=32), Net(width=32)
    run(make_trainer(path, make(**OPTIONS), max_epochs=10), "fit", model)
    for name in TARGETS:
        assert torch.equal(model.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight")), (
            "base_weights_stay"
        )


def subtract(weight: torch.Tensor, kept: Undo, buffers: object) -> None:
    """W -= d in place of unmerge_weight_."""
    for piece in (chunk.part for chunk in kept.chunks):
        delta = (piece.left @ piece.right).mul(kept.scaling).to(weight.dtype)
        weight.detach()[piece.row : piece.row + delta.shape[0]].sub_(delta)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 2**20], ids=["kept values", "plain copies"])
def test_unmerging_by_subtraction_fails_where_the_package_passes(tmp_path, monkeypatch, budget: int):
    monkeypatch.setattr(importlib.import_module("lightning_lora.model.merging"), "COPY_BUDGET", budget)
    base_weights_stay(LoRACallback, tmp_path)
    refuted(base_weights_stay, NaiveCallback, tmp_path)
    monkeypatch.setattr("lightning_lora.nn.adapted_weights.unmerge_weight_", subtract)
    refuted(base_weights_stay, LoRACallback, tmp_path)


# --- merging waits for the first batch ---


class MergesAtStart(LoRACallback):
    """Merges at on_validation_start."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        merge_to_evaluate(trainer, pl_module)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        pass


def averaged_loss(make: Make, path: Path) -> tuple[float, float]:
    """The logged validation loss beside EMAWeightAveraging, and the loss of the averaged weights computed by hand."""
    model = Net(lr=0.2)
    trainer = make_trainer(path, make(**OPTIONS), EMAWeightAveraging(decay=0.8), max_epochs=3)
    torch.manual_seed(0)
    run(trainer, "fit", model)  # leaves the averaged weights in the model
    with torch.no_grad():
        losses = [F.cross_entropy(model.eval()(x), y) for x, y in Data(BATCHES).val_dataloader()]
    return trainer.callback_metrics["val_loss"].item(), torch.stack(losses).mean().item()


def validates_the_average(make: Make, path: Path) -> None:
    logged, by_hand = averaged_loss(make, path)
    assert logged == pytest.approx(by_hand, rel=1e-5), "validates_the_average"


@weight_averaging
def test_merging_at_on_validation_start_beside_ema_fails_where_the_package_passes(tmp_path):
    validates_the_average(LoRACallback, tmp_path)
    validates_the_average(lambda **options: LoRACallback(merged_eval=False, **options), tmp_path)
    with pytest.raises(LoRAError, match="changed while it was merged"):  # by the average
        validates_the_average(MergesAtStart, tmp_path)
    refuted(validates_the_average, NaiveCallback, tmp_path)


# --- the filter is the last to see a checkpoint, and always sees it ---


class FiltersInItsHook(LoRACallback):
    """Filters in the callback's on_save_checkpoint."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        unpatch(pl_module.modules())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        write(pl_module, checkpoint, self.save)


def no_base_tensor_is_saved(make: Make, path: Path, weights_only: bool, *others: L.Callback) -> None:
    saves = ModelCheckpoint(path, "a", save_weights_only=weights_only, enable_version_counter=False)
    run(make_trainer(path, make(**OPTIONS), *others, saves), "fit", Net())
    base = {name: Net().get_parameter(f"{name}.weight") for name in TARGETS}
    found = dict(tensors(torch.load(path / "a.ckpt", weights_only=True)))
    assert any(name.endswith("head.lora_B") for name in found), "the adapter is saved"
    for name, tensor in found.items():
        leaked = name.endswith(tuple(f"{layer}.weight" for layer in base))
        assert not leaked, f"no_base_tensor_is_saved: {name}"
        assert not any(torch.equal(tensor, weight) for weight in base.values()), f"no_base_tensor_is_saved: {name}"


@pytest.mark.parametrize(
    "others",
    [pytest.param((), id="alone"), pytest.param((EMAWeightAveraging,), id="beside EMA", marks=weight_averaging)],
)
def test_filtering_in_the_hook_of_the_callback_fails_where_the_package_passes(
    tmp_path, others: tuple[Callable[[], L.Callback], ...]
):
    for weights_only in (True, False):
        no_base_tensor_is_saved(LoRACallback, tmp_path, weights_only, *(other() for other in others))
        # EMA's copies, and all that save_weights_only=True writes, come past the callback's hook.
        leaks = weights_only or bool(others)
        for mutant in (FiltersInItsHook, NaiveCallback):
            arguments = (mutant, tmp_path, weights_only, *(other() for other in others))
            if leaks:
                refuted(no_base_tensor_is_saved, *arguments)
            else:
                no_base_tensor_is_saved(*arguments)


def test_mutants_adapt_train_and_merge_otherwise(tmp_path):
    """The mutants fail for their mutation alone: otherwise they adapt, train and merge."""
    for make in (MergesAtStart, FiltersInItsHook, NaiveCallback):
        model = Net()
        run(make_trainer(tmp_path, make(**OPTIONS)), "fit", model)
        assert model.head.lora_B.abs().sum() > 0
        assert not is_merged(model)
        merge(model)
