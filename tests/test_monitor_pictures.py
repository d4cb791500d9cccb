"""LoRAMonitor(plots=True): pictures in TensorBoardLoggers, when fit ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_lora import (
    LoRAMonitor,
    adapter_stats,
    plot_adapter,
    save_adapter,
    summary,
)
from lightning_lora.report import figures
from support.runs import lora
from support.training import Data, Net, make_trainer


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
    (norms, figure, step), (spectra, _, _) = logger.experiment.figures
    assert (norms, spectra, step) == ("lora/norms", "lora/spectra", net.trainer.global_step)
    layer = net.get_submodule("body.3").requires_grad_(False)
    rms = float((layer.lora.spec.scaling * layer.lora_B @ layer.lora_A).square().mean().sqrt())
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "body"]
    assert rms > 0
    assert line.get_ydata()[list(line.get_xdata()).index(3)] == pytest.approx(rms, rel=1e-5)


@pytest.mark.slow
def test_the_command_draws_the_same_of_the_runs_checkpoint(tmp_path: Path):
    """Titles, names and values of the logger's pictures; the summary and the scalars have the same names."""
    board, scalars = TensorBoardLogger(), CSVLogger(tmp_path / "logs", "", "")
    net = Net()
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
    callbacks = [LoRAMonitor(every_n_steps=1), lora(), checkpoints]
    make_trainer(tmp_path, *callbacks, logger=[board, scalars], max_epochs=1, log_every_n_steps=1).fit(net, Data())
    source = tmp_path / "checkpoints" / "last.ckpt"
    save_adapter(net, tmp_path / "folder")
    for given in (source, tmp_path / "folder"):
        drawn = plot_adapter(given)
        assert [tag for tag, _, _ in board.experiment.figures] == [f"lora/{name}" for name in drawn]
        for (_, logged, _), figure in zip(board.experiment.figures, drawn.values(), strict=True):
            assert logged.get_suptitle() == figure.get_suptitle()
            assert [*map(content_of, logged.axes)] == [*map(content_of, figure.axes)]
    rows = [text.get_text() for text in drawn["norms"].axes[0].get_legend().get_texts()]
    assert rows == [group.name for group in summary(net).groups] == list(adapter_stats(net).groups)
    header = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name.split("/")[1] for name in header if name.startswith("lora/") and name.count("/") == 2} == set(rows)


def content_of(axes: Any) -> list[Any]:
    """What is drawn in a panel."""
    lines = [(line.get_label(), list(map(str, line.get_ydata()))) for line in axes.lines]
    texts = [text.get_text() for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())]
    return [lines, texts, axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")]


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
    assert events.Tags()["images"] == ["lora/norms", "lora/spectra"]
