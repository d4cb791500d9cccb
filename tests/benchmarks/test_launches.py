"""What a device is asked to do: the table in the README is what is counted now, and keeps its limits."""

from __future__ import annotations

import os
from importlib.metadata import version

import launches
import pytest
from launches import DTYPES, LAYERS, TABLE, Counts

STEP_LIMITS = {  # launches of a layer over the frozen network: in float32, and in bf16
    "LoRA": (6.5, 10),
    "LoRA, dropout": (8.5, 12),
    "DoRA": (20, 26),
    "PiSSA (peft: plain)": (12, 16),
}
BYTES_LIMITS = {"float32": 0.85, "bf16": 0.6}  # of peft's, in a step of LoRA
EVERY_LINE = pytest.mark.parametrize(
    ("name", "dtype"),  # each in one dtype, and with LORA_FULL=1 in all of them
    [
        (name, dtype)
        for number, name in enumerate(TABLE)
        for place, dtype in enumerate(DTYPES)
        if place == number % 2 or name == "LoRA" or os.environ.get("LORA_FULL")
    ],
)


def counts(name: str, dtype: str) -> Counts:
    return launches.counts(TABLE[name], DTYPES[dtype], LAYERS)


def test_the_readme_has_these_lines():
    header = launches.shown().splitlines()[: len(launches.HEADER)]
    assert header == list(launches.HEADER)
    names = [line.strip("| ").split(" | ")[:2] for line in launches.shown().splitlines()[len(header) :]]
    assert names == [[name, dtype] for name in TABLE for dtype in DTYPES]


def as_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def of_one_release(line: str) -> list[str]:
    """The cells that are compared: another release of peft has others, whatever this package does."""
    keeps = f"peft {version('peft')}" in launches.README.read_text()
    heads = as_cells(launches.HEADER[0])
    return [cell for head, cell in zip(heads, as_cells(line), strict=True) if keeps or "peft" not in head]


@EVERY_LINE
def test_what_is_counted_is_what_the_readme_shows_and_keeps_its_limits(name: str, dtype: str):
    """No change adds a launch, a byte or a wait unseen; `python tests/benchmarks/launches.py` writes the table."""
    found = counts(name, dtype)
    (line,) = launches.markdown({(name, dtype): found}).splitlines()[len(launches.HEADER) :]
    (shown,) = (each for each in launches.shown().splitlines() if as_cells(each)[:2] == [name, dtype])
    assert of_one_release(line) == of_one_release(shown), found.step.operators
    assert (found.step.waits, found.step.float64) == (0, 0), found.step.operators
    assert (found.cycle.waits, found.cycle.float64 / LAYERS in (6, 7)) == (12, True), found.cycle.operators
    if name in STEP_LIMITS:
        limit = STEP_LIMITS[name][[*DTYPES].index(dtype)]
        assert found.step.launches <= limit * LAYERS, found.step.operators
    if name == "LoRA":
        assert found.step.bytes <= BYTES_LIMITS[dtype] * found.peft_step.bytes


def test_without_a_release_of_peft_on_the_page_our_own_cells_are_compared(monkeypatch: pytest.MonkeyPatch):
    line = "| LoRA | bf16 | 9.5 | 13.75 | 0.21 | 6 | 7 | 0.78 |"
    assert of_one_release(line) == as_cells(line)
    monkeypatch.setattr(f"{__name__}.version", lambda package: "99.0")
    assert of_one_release(line) == ["LoRA", "bf16", "9.5", "6"]
