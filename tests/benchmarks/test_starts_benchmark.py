"""The benchmark of adapters that start from the weight or from data runs, and gives a figure in every cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_cell_of_the_tables_is_a_figure():
    program = Path(__file__).with_name("starts.py")
    small = ["--sides", "32", "--rounds", "1", "--width", "32", "--rows", "8", "--seconds", "0", "--threads", "1"]
    small += ["--hidden", "64", "--batches", "2", "16", "--data-rounds", "1"]
    run = subprocess.run(
        [sys.executable, str(program), *small], check=True, timeout=240, capture_output=True, text=True
    )
    starts, steps, data = (part.splitlines() for part in run.stdout.split("\n\n"))
    assert [line.split(" | ")[0] for line in starts[2:]] == ["| pissa", "| pissa_niter_4", "| olora"]
    assert len(steps) == 4
    assert [line.split(" | ")[0] for line in data[2:]] == ["| eva", "| lora_ga"]
    assert all(float(line.strip("| ").split(" | ")[-1]) < 1e-2 for line in data[2:])  # what both start from is the same
    for header, _, *rows in (starts, steps, data):
        for row in rows:
            cells = row.strip("| ").split(" | ")
            assert len(cells) == len(header.strip("| ").split(" | "))
            assert all(float(cell.split()[0]) >= 0 for cell in cells[2:])
