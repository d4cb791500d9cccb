"""What a device is asked to do: the table in the README is what is counted now, and keeps its limits."""

from __future__ import annotations

import functools
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
EVERY_LINE = pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in TABLE for dtype in DTYPES])


@functools.cache
def counts(name: str, dtype: str, layers: int = LAYERS) -> Counts:
    return launches.counts(TABLE[name], DTYPES[dtype], layers)


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
def test_what_is_counted_is_what_the_readme_shows(name: str, dtype: str):
    """No change adds a launch or a byte unseen; `python tests/benchmarks/launches.py` writes the table."""
    (line,) = launches.markdown({(name, dtype): counts(name, dtype)}).splitlines()[len(launches.HEADER) :]
    (shown,) = (each for each in launches.shown().splitlines() if as_cells(each)[:2] == [name, dtype])
    assert of_one_release(line) == of_one_release(shown), counts(name, dtype).step.operators


@pytest.mark.parametrize(("name", "float64"), [("LoRA", 6), ("DoRA", 7)])
def test_a_merge_cycle_waits_and_computes_in_float64_as_the_page_says(name: str, float64: int):
    cycle = counts(name, "bf16").cycle
    assert (cycle.waits, cycle.float64 / LAYERS) == (12, float64), cycle.operators
    assert "waits 12 times" in " ".join(launches.README.read_text().split())


def test_without_a_release_of_peft_on_the_page_our_own_cells_are_compared(monkeypatch: pytest.MonkeyPatch):
    line = "| LoRA | bf16 | 9.5 | 13.75 | 0.21 | 6 | 7 | 0.78 |"
    assert of_one_release(line) == as_cells(line)
    monkeypatch.setattr(f"{__name__}.version", lambda package: "99.0")
    assert of_one_release(line) == ["LoRA", "bf16", "9.5", "6"]


@EVERY_LINE
def test_a_step_waits_for_nothing_and_has_no_float64(name: str, dtype: str):
    step = counts(name, dtype).step
    assert (step.waits, step.float64) == (0, 0), step.operators


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEP_LIMITS)
def test_a_step_launches_at_most_its_limit(name: str, dtype: str):
    limit = STEP_LIMITS[name][[*DTYPES].index(dtype)]
    assert counts(name, dtype).step.launches <= limit * LAYERS, counts(name, dtype).step.operators


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_lora_touches_at_most_its_share_of_pefts_bytes(dtype: str):
    found = counts("LoRA", dtype)
    assert found.peft_step is not None
    assert found.step.bytes <= BYTES_LIMITS[dtype] * found.peft_step.bytes
