"""LoRAMonitor as a callback of its own: its options, beside which models and callbacks it works, in YAML too."""

from __future__ import annotations

import copy
import csv
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACLI, LoRAConfig, LoRAError, LoRAMonitor, inject, merge
from support.runs import TARGETS, BrokenError, lora
from support.training import Data, Net, make_trainer

SECONDS = "lora/merge_seconds"  # they differ from run to run


def fit(path: Path, model: L.LightningModule, *callbacks: L.Callback, **options: Any) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv that hold statistics."""
    torch.manual_seed(0)
    make_trainer(path, *callbacks, **{"logger": CSVLogger(path, name=None, version="")} | options).fit(model, Data())
    rows = csv.DictReader((path / "metrics.csv").read_text().splitlines())
    kept = [{name: float(v) for name, v in row.items() if v and name.startswith("lora/")} for row in rows]
    return [row for row in kept if row]


def injected(**options: Any) -> Net:
    torch.manual_seed(0)
    inject(model := Net(), LoRAConfig(r=2, target_modules=TARGETS, **options), seed=1)
    return model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every_n_steps": -1}, "every_n_steps must be a whole number from 0, but it is -1"),
        ({"every_n_steps": True}, "every_n_steps must be a whole number from 0, but it is True"),
        ({"every_n_steps": 2.0}, "every_n_steps must be a whole number from 0, but it is 2.0"),
        ({"plots": 1}, "plots must be true or false, but it is 1"),
        ({"every_n_step": 2}, "there is no option 'every_n_step' (did you mean 'every_n_steps'?)"),
        ({"colour": 2}, "there is no option 'colour' (there are every_n_steps, plots)"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], said: str):
    with pytest.raises(LoRAError, match=f"^LoRAMonitor: {re.escape(said)}"):
        LoRAMonitor(**options)


def test_options_are_taken_by_position_and_shown():
    assert repr(LoRAMonitor(10, False)) == "LoRAMonitor(every_n_steps=10, plots=False)"


def test_order_in_the_list_changes_nothing(tmp_path: Path):
    before = fit(tmp_path / "a", Net(), LoRAMonitor(1), lora(seed=1), max_epochs=2)
    after = fit(tmp_path / "b", Net(), lora(seed=1), LoRAMonitor(1), max_epochs=2)
    assert len(before) == len(after) == 6
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        assert {n: v for n, v in one.items() if n != SECONDS} == {n: v for n, v in other.items() if n != SECONDS}
    assert [SECONDS in row for row in after] == [False] * 3 + [True] * 3


def test_model_that_was_injected_by_hand_needs_no_other_callback(tmp_path: Path):
    alone = fit(tmp_path / "alone", injected(), LoRAMonitor(1), max_epochs=2)
    beside = fit(tmp_path / "beside", injected(), lora(), LoRAMonitor(1), max_epochs=2)
    assert len(alone) == 6
    assert alone == [{n: v for n, v in row.items() if n != SECONDS} for row in beside]


def test_network_injected_inside_the_module_is_monitored(tmp_path: Path):
    inject((model := Net()).body, LoRAConfig(r=2))
    assert set(fit(tmp_path, model, LoRAMonitor(3))[0]) == {
        f"lora/body.N/{name}" for name in ("norm", "rank", "grad_A", "grad_B")
    }


def test_fit_without_a_logger_is_refused_and_an_evaluation_is_not(tmp_path: Path):
    trainer = make_trainer(tmp_path, lora(), LoRAMonitor())
    with pytest.raises(LoRAError, match=r"^LoRAMonitor: this Trainer has no logger, so there is nowhere to log to\."):
        trainer.fit(model := Net(), Data())
    trainer.validate(model, Data(), verbose=False)


def test_fit_of_a_model_without_an_adapter_is_refused_with_both_remedies(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"^LoRAMonitor: Net has no adapter\. Put a LoRACallback .* call inject"):
        fit(tmp_path, Net(), LoRAMonitor())


class Breaks(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise BrokenError


def test_next_fit_after_an_exception_begins_anew(tmp_path: Path):
    monitor = LoRAMonitor(1)
    with pytest.raises(BrokenError):
        fit(tmp_path / "broken", model := Breaks(), lora(), monitor)
    assert len(monitor._statistics.runs) == len(monitor._draws) == 0
    assert not model.lora_injection.measures_rounding
    assert len(fit(tmp_path / "next", Net(), lora(), monitor)) == 3


class Copies(L.Callback):
    """Copies the model and the monitor in the midst of a fit."""

    def __init__(self, monitor: LoRAMonitor) -> None:
        self.monitor, self.copies = monitor, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.copies.append((copy.deepcopy(pl_module), copy.deepcopy(self.monitor)))
        pickle.loads(pickle.dumps(self.monitor))


@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs")
def test_copies_made_inside_a_fit_know_nothing_of_it(tmp_path: Path):
    """Merges of a monitored 16-bit model measure what rounding costs, which takes time; those of a copy do not."""
    monitor = LoRAMonitor(1)
    fit(tmp_path / "a", Net(), lora(), monitor, copies := Copies(monitor), precision="bf16-true", max_epochs=2)
    twin, other = copies.copies[-1]
    assert not twin.lora_injection.measures_rounding
    assert len(other._statistics.runs) == 0
    merge(twin)
    assert len(fit(tmp_path / "b", injected(), other)) == 3


@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs")
def test_rounding_is_measured_in_each_merge_of_a_monitored_fit_and_at_the_end_of_others(tmp_path: Path):
    costs: list[Any] = []

    class Reads(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            costs.append(pl_module.lora_injection.last_merge.rounding)

    options: dict[str, Any] = {"precision": "bf16-true", "max_epochs": 3}
    fit(tmp_path / "a", Net(), lora(), LoRAMonitor(1, plots=False), Reads(), **options)
    fit(tmp_path / "b", model := Net(), lora(), LoRAMonitor(0, plots=False), Reads(), **options)
    assert [cost is not None for cost in costs] == [True] * 3 + [False] * 3
    assert not model.lora_injection.measures_rounding


YAML = """
trainer:
  accelerator: cpu
  logger: {class_path: CSVLogger, init_args: {save_dir: logs, name: null, version: ""}}
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_lora.LoRAMonitor
      init_args: {every_n_steps: 3, plots: false}
"""
CALLBACK = "    - {class_path: lightning_lora.LoRACallback, init_args: {r: 2, target_modules: [head]}}\n"


@pytest.mark.parametrize(
    ("cli", "config"), [(LoRACLI, YAML + "lora: {r: 2, target_modules: [head]}\n"), (LightningCLI, YAML + CALLBACK)]
)
def test_yaml_has_it_beside_the_lora_block_or_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: type[LightningCLI], config: str
):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(config)
    run = cli(Net, Data, args=["fit", "--config", "c.yaml"], save_config_callback=None, seed_everything_default=1)
    (monitor,) = (each for each in run.trainer.callbacks if isinstance(each, LoRAMonitor))
    assert (monitor.every_n_steps, monitor.plots) == (3, False)
    assert "lora/head/norm" in Path("logs/metrics.csv").read_text()
