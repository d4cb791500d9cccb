"""Shrunk adapters: README.md and the picture show the figures that are kept, and a cell is measured again."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import shrink
import torch

import report


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(shrink.RESULTS.read_text())
    return content


def test_the_readme_shows_the_results_that_are_kept(kept: dict[str, Any]):
    shown = report.README.read_text().split(shrink.BEGIN)[1].split(shrink.END)[0]
    assert shown.strip() == shrink.page(kept)


def test_the_picture_has_a_line_for_each_way_to_a_rank(kept: dict[str, Any]):
    lines = shrink.plot(kept).axes[0].containers
    assert [each.get_label() for each in lines] == [shrink.DIRECT, shrink.SHRUNK, shrink.TRAINED]
    assert [len(each.lines[0].get_xdata()) for each in lines] == [len(shrink.RANKS), *2 * [len(shrink.SHARES)]]


def test_more_epochs_have_more_batches_and_a_part_of_one_some():
    data = torch.zeros(120, 1), torch.zeros(120)
    assert [len([*shrink.batches(data, epochs)]) for epochs in (0.4, 1, 1.5)] == [1, 2, 4]


@pytest.mark.slow
def test_cells_that_are_measured_again_are_like_those_that_are_kept(kept: dict[str, Any]):
    torch.set_num_threads(1)
    share, large = shrink.SHARES[2], next(row for row in kept["rows"] if row["rank"] == 64)
    # At the kept rate: two rates are so near that another processor chooses the other one, which gives other ranks.
    for again in shrink.measured(kept["seeds"], ranks=(64,), shares=(share,), rates=(large["rate"],)):
        before = next(row for row in kept["rows"] if (row["how"], row["rank"]) == (again["how"], again["rank"]))
        assert statistics.mean(again["right"]) == pytest.approx(statistics.mean(before["right"]), abs=0.08)
        assert again["ranks"] == pytest.approx(before["ranks"], rel=0.2)
