"""Statistics of a run: read from the files of Lightning's CSVLogger and of TensorBoard, drawn by step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRAError, plot_adapter
from lightning_lora.report import run_log
from lightning_lora.report.run_log import ALL, read_statistics

GROUPS, STATISTICS = ("q_proj", "up.proj"), ("norm", "rank", "grad_A", "grad_B", "cosine")
STEPS = (49, 99, 149)


def value(group: str, statistic: str, step: int) -> float:
    return step / 100 + GROUPS.index(group) + 10 * STATISTICS.index(statistic)


def metrics(step: int) -> dict[str, float]:
    return {f"lora/{g}/{s}": value(g, s, step) for g in GROUPS for s in STATISTICS} | {"lora/merge_time": step / 7}


@pytest.fixture
def csv_log(tmp_path: Path) -> Path:
    logger = CSVLogger(tmp_path, name="runs", version="a")
    for step in STEPS:
        logger.log_metrics({"train_loss": 1.0}, step - 20)
        logger.log_metrics(metrics(step), step)
    logger.save()
    return Path(logger.log_dir)


def check(folder: Path) -> None:
    found = read_statistics(folder)
    assert set(found.series) == {*STATISTICS, "merge_time"}
    for statistic in STATISTICS:
        for group in GROUPS:
            expected = [(step, value(group, statistic, step)) for step in STEPS]
            np.testing.assert_allclose(found.series[statistic][group], expected, rtol=1e-6)
    assert found.series["merge_time"][ALL][1] == pytest.approx((99, 99 / 7), rel=1e-6)


def test_a_csv_log_is_read_from_its_file_and_its_folder(csv_log: Path):
    check(csv_log)
    check(csv_log / "metrics.csv")


def test_tensorboard_events_are_read_from_their_file_and_their_folder(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="runs", version="a")
    for step in STEPS:
        logger.log_metrics({"train_loss": 1.0, **metrics(step)}, step)
    logger.finalize("success")
    check(Path(logger.log_dir))
    (events,) = Path(logger.log_dir).glob("events*")
    check(events)
    assert set(plot_adapter(logger.log_dir)) == {"statistics"}


def test_each_statistic_has_a_panel_and_each_group_a_line(csv_log: Path):
    (figure,) = plot_adapter(csv_log).values()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert list(panels) == [*STATISTICS, "merge_time"]
    for statistic in STATISTICS:
        for line, group in zip(panels[statistic].lines, GROUPS, strict=False):
            np.testing.assert_allclose(line.get_xdata(), STEPS)
            np.testing.assert_allclose(line.get_ydata(), [value(group, statistic, step) for step in STEPS])
    np.testing.assert_allclose(panels["merge_time"].lines[-1].get_ydata(), [step / 7 for step in STEPS])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*GROUPS, ALL]
    assert legend.get_title().get_text() == "a/metrics.csv"
    drawn = panels["norm"].lines
    styles = {(line.get_linestyle(), line.get_marker(), line.get_color()) for line in drawn}
    assert len({style for style, _, _ in styles}) == len({marker for _, marker, _ in styles}) == len(drawn)


def test_more_groups_than_lines_are_counted(tmp_path: Path):
    names = [f"lora/g{i}/norm" for i in range(20)]
    (tmp_path / "metrics.csv").write_text("\n".join([",".join(["step", *names]), ",".join(map(str, range(21)))]))
    (figure,) = plot_adapter(tmp_path / "metrics.csv").values()
    assert len(figure.axes[0].lines) == 12
    assert figure.legends[0].get_title().get_text().endswith("metrics.csv, 12 of 20 groups")


def test_values_that_are_not_finite_leave_a_gap_and_are_named(tmp_path: Path):
    (tmp_path / "m.csv").write_text("step,lora/q/norm\n0,1.0\n5,nan\n9,2.0\n")
    (figure,) = plot_adapter(tmp_path / "m.csv").values()
    assert figure.get_suptitle() == "1 statistic over a run, 1 line; not finite at step 5: norm of q"
    values = figure.axes[0].lines[0].get_ydata()
    assert [math.isnan(value) for value in values] == [False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,train_loss\n0,1.0\n", "holds no statistics of an adapter .names such as lora/q_proj/norm"),
        ("", "has no column `step`"),
        ("epoch,lora/q/norm\n0,1.0\n", "has no column `step`"),
        ("step,lora/q/norm\n0,high\n", "cannot be read as a CSV file of numbers"),
        ("step,lora/q/norm\n,1.0\n", "cannot be read as a CSV file of numbers"),
        ("step,lora/q/norm\n0,1.0,3,4\n1\n", None),
    ],
)
def test_a_csv_file_without_statistics_is_refused(tmp_path: Path, content: str, message: str | None):
    (tmp_path / "metrics.csv").write_text(content)
    if message is None:
        assert plot_adapter(tmp_path / "metrics.csv")
        return
    with pytest.raises(LoRAError, match=f"plot: .*metrics.csv: {message}"):
        plot_adapter(tmp_path / "metrics.csv")


def test_a_log_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"plot: .*gone.csv: cannot be read as a CSV file of numbers: .*No such file"):
        plot_adapter(tmp_path / "gone.csv")


def test_events_without_tensorboard_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setattr(run_log, "find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"TensorBoard's events need tensorboard; pip install tensorboard\."):
        plot_adapter(tmp_path)


@pytest.mark.parametrize("beside", ["other", "base"])
def test_a_log_is_drawn_by_itself(csv_log: Path, beside: str):
    arguments: dict[str, Any] = {beside: csv_log}
    with pytest.raises(LoRAError, match="is a log of a run, which is drawn by itself; leave out other and base"):
        plot_adapter(csv_log, **arguments)
