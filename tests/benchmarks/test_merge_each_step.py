"""What drift costs a run: here the saved adapter has the run's loss; README.md and the picture show what was kept."""

from __future__ import annotations

import json
from typing import Any

import merge_each_step
import pytest
import torch

import report


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(merge_each_step.RESULTS.read_text())
    return content


def test_the_saved_adapter_has_the_loss_of_the_run_in_every_row_of_ours_alone(kept: dict[str, Any]):
    for row in kept["rows"]:
        assert (row["saved"] == row["in_run"]) == (row["package"] == "ours"), row
    counts = [len(merge_each_step.RATES), len(merge_each_step.SEEDS), len(merge_each_step.CANDIDATES)]
    assert len(kept["rows"]) == counts[0] * counts[1] * counts[2]


def test_the_readme_shows_the_results_that_are_kept(kept: dict[str, Any]):
    shown = report.README.read_text().split(merge_each_step.BEGIN)[1].split(merge_each_step.END)[0]
    assert shown.strip() == merge_each_step.markdown(kept)


def test_the_picture_has_a_line_for_each_rate_and_package(kept: dict[str, Any]):
    axes = merge_each_step.plot(kept).axes[0]
    assert len(axes.lines) == len(merge_each_step.RATES) * len(merge_each_step.CANDIDATES)
    assert {tuple(line.get_xdata()) for line in axes.lines} == {tuple(kept["steps"])}
    assert sum(not any(line.get_ydata()) for line in axes.lines) == len(merge_each_step.RATES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_a_cell_that_is_run_again_is_like_the_kept_one(kept: dict[str, Any]):
    """Its first 100 steps. Python's manual and library differ a little between its versions, and so do the losses."""
    torch.set_num_threads(1)
    steps = merge_each_step.STEPS[:3]
    rate, seed = merge_each_step.RATES[-1], merge_each_step.SEEDS[0]
    for package, make in merge_each_step.CANDIDATES.items():
        before = next(
            row for row in kept["rows"] if (row["rate"], row["seed"], row["package"]) == (rate, seed, package)
        )
        again = merge_each_step.train(make, rate, seed, steps)
        assert again["in_run"] == pytest.approx(before["in_run"][: len(steps)], rel=0.1)
        gap = abs(again["saved"][-1] - again["in_run"][-1])
        assert gap == 0 if package == "ours" else 0 < gap < 0.01
