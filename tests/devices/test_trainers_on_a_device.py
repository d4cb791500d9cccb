"""A Trainer on a device that is not the CPU: merged validation, each kind of checkpoint, resuming, the best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACallback, LoRAMonitor, is_merged, load_from_checkpoint
from support.covering import covering
from support.devices.places import Place, on_the_device
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, weights
from support.runs.with_callback import Watched, base_weights, lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
]
KINDS = ("adapter", "merged", "full")
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {"modules_to_save": ["body.1"]},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "EVA": {"init_lora_weights": "eva"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "LoHa": {"variant": "loha"},
    "LoRA, dropout": {"lora_dropout": 0.2},
}


def fitted(path: Path, model: Net, callback: LoRACallback, place: dict[str, Any], **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    keep = ModelCheckpoint(path, "{epoch}", monitor="val_loss", save_top_k=-1, enable_version_counter=False)
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(path, callback, keep, **{"max_epochs": 3} | place | options)
    trainer.fit(model, Data(), ckpt_path=resume, **PLAIN_TYPES_ONLY)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kind"), covering([*VARIANTS], KINDS, meet=1))
def test_a_run_on_a_device_is_that_on_the_cpu_resumes_and_tests_its_best(
    variant: str, kind: str, tmp_path: Path, a_device: Place
):
    options = VARIANTS[variant]
    on_cpu, path = Watched(), tmp_path / "device"
    fitted(tmp_path / "cpu", on_cpu, lora(save=kind, **options), {})
    with a_device() as device:
        model, again = Watched(), Watched()
        base = base_weights(model)
        trainer = fitted(path, model, lora(save=kind, **options), on_the_device(device))
        assert trainer.strategy.root_device.type == device
        assert {merged for stage, merged, _ in model.seen if stage == "validation"} == {True}
        assert {merged for stage, merged, _ in model.seen if stage == "train"} == {False}
        found = weights(model)
        kept = [name for name in base if not name.startswith(tuple(options.get("modules_to_save", ())) or "-")]
        assert_same_tensors({name: found[name] for name in kept}, {name: base[name] for name in kept})
        (tested,) = trainer.test(model, Data(), ckpt_path="best", verbose=False, **PLAIN_TYPES_ONLY)
        assert tested["test_loss"] == pytest.approx(trainer.checkpoint_callback.best_model_score.item(), rel=1e-5)
        assert not is_merged(model)
        fitted(path, again, lora(save=kind, **options), on_the_device(device), ckpt_path=str(path / "epoch=1.ckpt"))
        if "lora_dropout" not in options:  # whose masks come from the random stream
            assert_same_tensors(weights(again), found)
    if "lora_dropout" not in options:  # a device draws other masks
        losses = [[loss for stage, _, loss in each.seen if stage != "test"] for each in (model, on_cpu)]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_device_goes_on_on_the_cpu_and_back(kind: str, tmp_path: Path, a_device: Place):
    with a_device() as device:
        there, on_cpu, back = Net(), Net(), Net()
        fitted(tmp_path, there, lora(save=kind), on_the_device(device))
        source = tmp_path / "epoch=1.ckpt"
        loaded = load_from_checkpoint(Net, source)
        assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
        fitted(tmp_path, on_cpu, lora(save=kind), {}, ckpt_path=str(source))
        for name, value in on_cpu.state_dict().items():
            torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-4, atol=1e-5)
        last = str(tmp_path / "epoch=2.ckpt")  # of the CPU
        fitted(tmp_path, back, lora(save=kind), on_the_device(device), ckpt_path=last, max_epochs=4)
        assert all(value.isfinite().all() for value in back.parameters())


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
def test_each_precision_trains_and_validates_merged_on_a_device(precision: str, tmp_path: Path, a_device: Place):
    with a_device() as device:
        model = Watched()
        options = on_the_device(device, precision) | {"logger": CSVLogger(tmp_path), "max_epochs": 2}
        fit_model(tmp_path, model, lora(), LoRAMonitor(), **options)
        factors = [p for name, p in model.named_parameters() if "lora_" in name]
        wide = torch.float64 if precision == "64-true" else torch.float32
        assert {p.dtype for p in factors} == {wide}
        assert all(p.isfinite().all() for p in factors)
        assert {merged for stage, merged, _ in model.seen if stage == "validation"} == {True}
