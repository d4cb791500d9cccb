"""LoRAMonitor(plots=True): pictures in TensorBoardLoggers, when fit ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_lora import (
    LoRAMonitor,
)
from lightning_lora.report import figures
from support.runs.training import Data, Net, make_trainer
from support.runs.with_callback import lora


class Board:
    """As TensorBoard's writer."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, Any, int]] = []

    def add_figure(self, tag: str, figure: Any, global_step: int, close: bool = True) -> None:
        self.figures.append((tag, figure, global_step))


class TensorBoardLogger(Logger):
    """Stands in for Lightning's, which needs tensorboard. Both packages of Lightning have one, so names count."""

    name, version = "figures", 0

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Board()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


def pictures_alone() -> LoRAMonitor:
    return LoRAMonitor(every_n_steps=0)


def fit(path: Path, callbacks: list[L.Callback], *loggers: Logger, net: Net | None = None) -> Net:
    net = net or Net()
    make_trainer(path, *callbacks, logger=list(loggers), max_epochs=1).fit(net, Data())
    return net


def test_norms_and_spectra_of_the_trained_adapter_are_added_at_the_last_step(tmp_path: Path):
    logger = TensorBoardLogger()
    net = fit(tmp_path, [lora(), pictures_alone()], logger, CSVLogger(tmp_path))
    (rms, figure, step), (spectra, _, _) = logger.experiment.figures
    assert (rms, spectra, step) == ("lora/rms", "lora/spectra", net.trainer.global_step)
    layer = net.get_submodule("body.3").requires_grad_(False)
    rms = float((layer.lora.spec.scaling * layer.lora_B @ layer.lora_A).square().mean().sqrt())
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "body"]
    assert rms > 0
    assert line.get_ydata()[list(line.get_xdata()).index(3)] == pytest.approx(rms, rel=1e-5)


class Diverges(Net):
    """Its adapters are NaN at the end."""

    def on_train_end(self) -> None:
        with torch.no_grad():
            self.body[3].lora_B.fill_(float("nan"))


def test_a_diverged_run_ends_with_a_warning_that_names_the_factor(tmp_path: Path):
    logger = TensorBoardLogger()
    with pytest.warns(UserWarning, match=r"LoRAMonitor: plots: .*body\.3\.lora_B"):
        fit(tmp_path, [lora(save="adapter"), pictures_alone()], logger, net=Diverges())
    assert logger.experiment.figures == []


@pytest.mark.parametrize("case", ["another logger", "not wished", "no matplotlib"])
def test_updates_are_not_measured_where_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.setattr("lightning_lora.monitor.measure", None)
    if case == "no matplotlib":
        monkeypatch.setattr(figures, "find_spec", lambda name: None)
    logger = CSVLogger(tmp_path) if case == "another logger" else TensorBoardLogger()
    fit(tmp_path, [lora(), LoRAMonitor(plots=case != "not wished")], logger)


@pytest.mark.slow
def test_tensorboard_holds_both_pictures(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch import loggers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.TensorBoardLogger(tmp_path)
    fit(tmp_path, [lora(), pictures_alone()], logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["lora/rms", "lora/spectra"]
