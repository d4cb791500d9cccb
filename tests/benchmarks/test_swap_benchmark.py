"""The benchmark of swapped adapters runs, and gives a figure in every cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_cell_of_the_table_is_a_figure():
    program = Path(__file__).with_name("swap.py")
    command = [sys.executable, str(program), "--layers", "2", "--width", "32", "--seconds", "0", "--threads", "1"]
    run = subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    header, _, *rows = (line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("|"))
    assert len(rows) == 4
    for row in rows:
        assert len(row) == len(header)
        assert all(float(cell.split()[0]) > 0 or cell.endswith("ms") for cell in row[2:])
