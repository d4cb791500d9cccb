"""Each benchmark that prints a table runs in small, and gives a figure in every cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK = ["--seconds", "0", "--threads", "1"]
SMALL: dict[str, tuple[list[str], int]] = {  # options, and how many rows there are
    "dora": (["--widths", "16", "--tokens", "4"], 2),
    "parameters": (["--width", "32"], 6),
    "quantised": (["--width", "64"], 4),
    "rows": (["--width", "32"], 4),
    "swap": (["--layers", "2", "--width", "32"], 4),
}
MAY_BE_ZERO = {"dora", "parameters", "rows"}


def printed(program: str, *options: str) -> str:
    command = [sys.executable, str(HERE / f"{program}.py"), *options, *QUICK]
    return subprocess.run(command, check=True, timeout=240, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", SMALL)
def test_every_cell_of_the_table_is_a_figure(program: str):
    if program == "quantised":
        pytest.importorskip("bitsandbytes")
    options, count = SMALL[program]
    lines = printed(program, *options).splitlines()
    header, _, *rows = (line.strip("| ").split(" | ") for line in lines if line.startswith("|"))
    assert len(rows) == count
    for row in rows:
        assert len(row) == len(header)
        figures = [float(cell.split()[0]) for cell in row[2:] if program != "swap" or not cell.endswith("ms")]
        assert all(figure >= 0 if program in MAY_BE_ZERO else figure > 0 for figure in figures)


@pytest.mark.slow
def test_every_cell_of_the_tables_of_starts_is_a_figure():
    small = ["--sides", "32", "--rounds", "1", "--width", "32", "--rows", "8"]
    out = printed("starts", *small, "--hidden", "64", "--batches", "2", "16", "--data-rounds", "1")
    starts, steps, data = (part.splitlines() for part in out.split("\n\n"))
    assert [line.split(" | ")[0] for line in starts[2:]] == ["| pissa", "| pissa_niter_4", "| olora"]
    assert len(steps) == 4
    assert [line.split(" | ")[0] for line in data[2:]] == ["| eva", "| lora_ga"]
    assert all(float(line.strip("| ").split(" | ")[-1]) < 1e-2 for line in data[2:])  # what both start from is the same
    for header, _, *rows in (starts, steps, data):
        for row in rows:
            cells = row.strip("| ").split(" | ")
            assert len(cells) == len(header.strip("| ").split(" | "))
            assert all(float(cell.split()[0]) >= 0 for cell in cells[2:])
