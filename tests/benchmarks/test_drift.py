"""Frozen weights that drift with peft and loralib, and not here; README.md and the picture show what was measured."""

from __future__ import annotations

import itertools
import json
from typing import Any

import drift
import pytest

import report


@pytest.fixture(scope="module")
def small() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = drift.measured(width=48, cycles=(1, 4))["rows"]
    return rows


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(drift.RESULTS.read_text())
    return content


def test_no_value_changes_here_in_any_dtype(small: list[dict[str, Any]]):
    rows = [row for row in small if row["package"] == "ours"]
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    assert [row[figure] for row in rows for figure in drift.FIGURES] == 3 * len(rows) * [[0, 0]]


def test_the_same_cycles_change_weights_elsewhere(small: list[dict[str, Any]]):
    for package, dtype in itertools.product(["peft", "loralib"], drift.DTYPES):
        changing, same = (row for row in small if (row["package"], row["dtype"]) == (package, dtype))
        assert 0 < changing["changed"][0] < changing["changed"][1] < 1
        assert same["changed"][1] < changing["changed"][1]
        assert all(0 < value < 1 for figure in drift.FIGURES for value in (*changing[figure], *same[figure]))


def test_the_readme_shows_the_results_that_are_kept(kept: dict[str, Any]):
    shown = report.README.read_text().split(drift.BEGIN)[1].split(drift.END)[0]
    assert shown.strip() == drift.markdown(kept)


def test_the_picture_has_the_lines_of_the_changing_adapter(kept: dict[str, Any]):
    axes = drift.plot(kept).axes[0]
    rows = [row for row in kept["rows"] if row["adapter"] == "changes"]
    assert [list(line.get_ydata()) for line in axes.lines] == [row["moved"] for row in rows]
    assert {tuple(line.get_xdata()) for line in axes.lines} == {tuple(kept["cycles"])}
    texts = [text.get_text() for text in axes.texts]
    assert [text.split(":")[0] for text in texts] == ["bf16", "fp16", "fp32", "lightning_lora"]
    assert texts[-1] == "lightning_lora: 0% in each"
