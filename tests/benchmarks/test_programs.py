"""Each benchmark that prints a table runs in small, and gives a figure in every cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = {  # options, and how many rows each table has
    "variants": (["--scale", "16", "--seconds", "0"], [6, 4, 6, 4]),
    "swap": (["--layers", "2", "--width", "32", "--seconds", "0"], [4]),
    "shrink": (["--seeds", "1", "--epochs", "1"], [16]),
    "starts": (["--sides", "32", "--rounds", "1"], [3]),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", SMALL)
def test_every_cell_of_the_tables_is_a_figure(program: str):
    pytest.importorskip("bitsandbytes")
    options, counts = SMALL[program]
    command = [sys.executable, str(HERE / f"{program}.py"), *options, "--threads", "1"]
    out = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout
    tables = [[line.strip("| ").split(" | ") for line in table.splitlines()] for table in out.strip().split("\n\n")]
    assert [len(table) - 2 for table in tables] == counts
    for header, _, *rows in tables:
        for row in rows:
            assert len(row) == len(header)
            figures = [figure for cell in row[2:] for figure in cell.split(", ")]  # a cell may hold one for each layer
            assert all(float(figure.split()[0].strip("*")) >= 0 for figure in figures), row
