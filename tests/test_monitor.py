"""LoRAMonitor as a callback of its own: its options, beside which models and callbacks it works, in YAML too."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACLI, LoRAConfig, LoRAError, LoRAMonitor, inject
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import Data, Net, make_trainer
from support.runs.with_callback import TARGETS, BrokenError, lora


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
        ({"plots": 1}, "plots must be true or false, but it is 1"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], said: str):
    with pytest.raises(LoRAError, match=f"^LoRAMonitor: {re.escape(said)}"):
        LoRAMonitor(**options)
    assert repr(LoRAMonitor(10, False)) == "LoRAMonitor(every_n_steps=10, plots=False)"


@pytest.mark.slow
def test_model_that_was_injected_by_hand_is_monitored_alone_and_before_or_after_the_callback(tmp_path: Path):
    alone = fit(tmp_path / "alone", injected(), LoRAMonitor(1), max_epochs=2)
    beside = fit(tmp_path / "beside", injected(), lora(), LoRAMonitor(1), max_epochs=2)
    before = fit(tmp_path / "before", injected(), LoRAMonitor(1), lora(), max_epochs=2)
    assert len(alone) == 6
    assert alone == beside == before


def test_network_injected_inside_the_module_is_monitored(tmp_path: Path):
    inject((model := Net()).body, LoRAConfig(r=2))
    assert set(fit(tmp_path, model, LoRAMonitor(3))[0]) == {
        f"lora/body/{name}" for name in ("norm", "rank", "grad_A", "grad_B")
    }


@UNTRAINED_NOTICE
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
        if batch_idx == 1:
            raise BrokenError
        return super().training_step(batch, batch_idx)


def test_next_fit_after_an_exception_begins_anew(tmp_path: Path):
    monitor = LoRAMonitor(1)
    with pytest.raises(BrokenError):
        fit(tmp_path / "broken", Breaks(), lora(), monitor)
    rows = fit(tmp_path / "next", Net(), lora(), monitor)
    assert len(rows) == 3
    assert not any("cosine" in name for name in rows[0])


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


@pytest.mark.slow
@pytest.mark.usefixtures("as_program")
def test_yaml_has_it_beside_the_lora_block():
    Path("c.yaml").write_text(YAML + "lora: {r: 2, target_modules: [head]}\n")
    run = LoRACLI(Net, Data, args=["fit", "--config", "c.yaml"], save_config_callback=None, seed_everything_default=1)
    (monitor,) = (each for each in run.trainer.callbacks if isinstance(each, LoRAMonitor))
    assert (monitor.every_n_steps, monitor.plots) == (3, False)
    assert "lora/head/norm" in Path("logs/metrics.csv").read_text()
