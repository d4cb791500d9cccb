"""The benchmarks run, every row is a number, and the README shows what was measured."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_merging_and_memory_give_finite_rows(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(RUN), "--quick", "--threads", "1", "--only", "c,d,g", "--json", str(file)]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    rows = json.loads(file.read_text())["rows"]
    assert {row["what"].split(" bf16")[0] for row in rows} == {
        "merge and unmerge",
        "peak memory of a training step",
        "peak memory of merging",
        "hooks of a training step",
    }
    assert all(math.isfinite(row["value"]) for row in rows)


def test_the_readme_shows_the_results_that_are_kept():
    report = runpy.run_path(str(RUN.with_name("report.py")))
    shown = report["README"].read_text().split(report["BEGIN"])[1].split(report["END"])[0]
    assert shown.strip() == report["markdown"](json.loads(report["RESULTS"].read_text()))


def test_the_plot_shows_the_time_relative_to_peft_that_was_measured():
    report = runpy.run_path(str(RUN.with_name("report.py")))
    content = json.loads(report["RESULTS"].read_text())
    axes = report["plot"](content).axes[0]
    measured = {(row["what"], row["at"]): row["value"] for row in content["rows"] if row["figure"] == "/ peft"}
    names = [(kind.format(dtype), at) for kind, at, _ in report["SHOWN"] for dtype in report["BARS"]]
    expected = [measured[name] for name in dict.fromkeys(names)]
    assert [bar.get_height() for bar in axes.patches] == expected
    assert 6 <= len(report["SHOWN"]) <= 8
    assert axes.get_title(loc="left") == "Time relative to peft, lower is better"
    assert [list(line.get_ydata()) for line in axes.lines if list(line.get_ydata()) == [1.0, 1.0]]
    assert "peft" in [text.get_text() for text in axes.texts]
