"""LoRAMonitor(plots=True): pictures in loggers that take figures, when fit ends."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    LoRAMonitor,
    adapter_stats,
    inject,
    plot_adapter,
    save_adapter,
    summary,
)
from lightning_lora.report import pictures
from lightning_lora.trainer.log_plots import log_plots, tell_of_no_logger
from support.notices import lightning_logger
from support.runs import lora
from support.training import Data, Net, make_trainer


class Board:
    """As TensorBoard's writer."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, Any, int]] = []

    def add_figure(self, tag: str, figure: Any, global_step: int, close: bool = True) -> None:
        self.figures.append((tag, figure, global_step))


class Figures(Logger):
    """A logger that takes figures."""

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


def test_heat_map_and_spectra_of_the_trained_adapter_are_added_at_the_last_step(tmp_path: Path):
    logger = Figures()
    net = fit(tmp_path, [lora(), pictures_alone()], logger, CSVLogger(tmp_path))
    (norms, figure, step), (spectra, _, _) = logger.experiment.figures
    assert (norms, spectra, step) == ("lora/norms", "lora/spectra", net.trainer.global_step)
    layer = net.get_submodule("body.3").requires_grad_(False)
    share = 100 * float((layer.lora.spec.scaling * layer.lora_B @ layer.lora_A).norm() / layer.weight.norm())
    shown = figure.axes[0].images[0].get_array()
    assert share > 0
    assert float(shown[0, 1]) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("save", ["adapter", "merged", "full"])
def test_the_command_draws_the_same_of_the_runs_checkpoint(tmp_path: Path, save: Any):
    """Titles, names and values of the logger's pictures; the summary and the scalars have the same names."""
    board, scalars = Figures(), CSVLogger(tmp_path / "logs", "", "")
    net = Net()
    torch.save(net.state_dict(), tmp_path / "base.pt")
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
    callbacks = [LoRAMonitor(every_n_steps=1), lora(save=save), checkpoints]
    make_trainer(tmp_path, *callbacks, logger=[board, scalars], max_epochs=1, log_every_n_steps=1).fit(net, Data())
    source = tmp_path / "checkpoints" / "last.ckpt"
    save_adapter(net, tmp_path / "folder")
    for given, base in ((source, None), (source, tmp_path / "base.pt"), (tmp_path / "folder", None)):
        drawn = plot_adapter(given, base=base)
        assert [tag for tag, _, _ in board.experiment.figures] == [f"lora/{name}" for name in drawn]
        for (_, logged, _), figure in zip(board.experiment.figures, drawn.values(), strict=True):
            assert logged.get_suptitle() == figure.get_suptitle()
            assert [*map(content_of, logged.axes)] == [*map(content_of, figure.axes)]
    rows = [label.get_text() for label in drawn["norms"].axes[0].get_yticklabels()]
    assert rows == [group.name for group in summary(net).groups] == list(adapter_stats(net).groups)
    header = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name.split("/")[1] for name in header if name.startswith("lora/") and name.count("/") == 2} == set(rows)


def content_of(axes: Any) -> list[Any]:
    """What is drawn in a panel, without the name of the source."""
    shown = [list(map(str, image.get_array().ravel())) for image in axes.images]
    lines = [list(map(str, line.get_ydata())) for line in axes.lines]
    texts = [text.get_text() for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())]
    return [shown, lines, texts, axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="right")]


def test_nothing_is_drawn_by_default(tmp_path: Path):
    logger = Figures()
    fit(tmp_path, [lora()], logger)
    assert logger.experiment.figures == []


class Trains(Net):
    """Says when its first batch comes."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        logging.getLogger(lightning_logger()).info("training")


def test_a_hint_is_given_before_training_where_no_logger_takes_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, lightning_logger()):
        fit(tmp_path, [lora(), pictures_alone()], CSVLogger(tmp_path), net=Trains())
    order = [message for message in caplog.messages if "LoRAMonitor: plots" in message or message == "training"]
    assert "LoRAMonitor: plots" in order[0]
    (hint,) = [message for message in caplog.messages if "LoRAMonitor: plots" in message]
    assert hint == (
        "LoRAMonitor: plots: no logger of this Trainer takes figures, as TensorBoardLogger does; "
        "plot_adapter(model, output='adapter.png') draws them."
    )


def test_no_hint_is_given_where_a_logger_takes_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, lightning_logger()):
        fit(tmp_path, [lora(), pictures_alone()], CSVLogger(tmp_path), Figures())
        fit(tmp_path, [lora()], CSVLogger(tmp_path))
    assert not [message for message in caplog.messages if "LoRAMonitor: plots" in message]


def test_the_first_rank_alone_draws_and_gives_hints(caplog: pytest.LogCaptureFixture):
    net = Net()
    inject(net, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))
    for is_first in (False, True):
        board, logger = Figures(), CSVLogger("unused")
        trainers = [SimpleNamespace(is_global_zero=is_first, loggers=[each], global_step=3) for each in (board, logger)]
        with caplog.at_level(logging.INFO, lightning_logger()):
            for trainer in trainers:
                log_plots(trainer, net)
                tell_of_no_logger(trainer)
        assert len(board.experiment.figures) == 2 * is_first
        assert sum("LoRAMonitor: plots" in message for message in caplog.messages) == is_first


class Diverges(Net):
    """Its adapters are NaN at the end."""

    def on_train_end(self) -> None:
        with torch.no_grad():
            self.body[3].lora_B.fill_(float("nan"))


def test_a_diverged_run_ends_with_a_picture_that_names_the_layer(tmp_path: Path):
    logger = Figures()
    fit(tmp_path, [lora(save="adapter"), pictures_alone()], logger, net=Diverges())
    assert logger.experiment.figures[0][1].get_suptitle() == "1 update of 3 not finite, first body.N of layer 3"


def test_what_cannot_be_measured_is_a_warning_and_the_fit_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(module: Any) -> Any:
        raise LoRAError("nothing to draw")

    monkeypatch.setattr("lightning_lora.trainer.log_plots.updates_of_model", fails)
    with pytest.warns(UserWarning, match="LoRAMonitor: plots: nothing to draw"):
        fit(tmp_path, [lora(), pictures_alone()], Figures())


def test_a_missing_matplotlib_is_told_before_training_and_costs_the_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    monkeypatch.setattr("lightning_lora.monitor.log_plots", None)  # nothing is measured for them
    logger = Figures()
    with caplog.at_level(logging.INFO, lightning_logger()):
        fit(tmp_path, [lora(), LoRAMonitor()], logger, net=Trains())
    told = [message for message in caplog.messages if "plots" in message or message == "training"]
    needs = "LoRAMonitor: plots: needs matplotlib; pip install matplotlib. This fit ends without pictures."
    assert told == [needs, *["training"] * 3]
    assert logger.experiment.figures == []


def test_updates_are_not_measured_where_no_logger_takes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_lora.monitor.log_plots", None)
    fit(tmp_path, [lora(), LoRAMonitor()], CSVLogger(tmp_path))
    fit(tmp_path, [lora(), LoRAMonitor(plots=False)], Figures())


def test_plots_is_true_or_false():
    with pytest.raises(LoRAError, match="LoRAMonitor: plots must be true or false, but it is 3"):
        LoRAMonitor(plots=3)  # type: ignore[arg-type]


def test_tensorboard_holds_both_pictures(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, [lora(), pictures_alone()], logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["lora/norms", "lora/spectra"]
