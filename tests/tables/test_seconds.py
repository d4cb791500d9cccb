"""What the README's table of seconds stands on: the work grows with the number of layers alone, and in step with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seconds
from seconds import OPTIONS, Steps, large, small

from lightning_lora import LoRACallback
from support.scale import MODELS, Llama
from support.shortcuts import without_collections


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    with without_collections():  # which call what is told of freed objects
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)
    return count


WORKS: dict[str, Callable[[Steps], Any]] = {
    "inject": lambda steps: steps.injecting()[0],
    "fit": lambda steps: steps.fitting(LoRACallback(**OPTIONS))[0],
    "save": lambda steps: steps.saving(),
    "load": lambda steps: (steps.saving()(), steps.loading())[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_calls_are_linear_in_the_number_of_blocks(tmp_path: Path, name: str):
    for blocks in (1, 2):  # the first ones import and fill caches
        WORKS[name](Steps(small(blocks), tmp_path))()
    few, more, most = (calls(WORKS[name](Steps(small(blocks), tmp_path))) for blocks in (2, 4, 8))
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)


@pytest.mark.slow
def test_injection_calls_as_much_for_any_width():
    narrow, wide = (Llama("", blocks=2, hidden=side, intermediate=side, keys=128, vocabulary=9) for side in (256, 8192))
    found = [calls(WORKS["inject"](Steps(large(sizes), Path()))) for sizes in (narrow, narrow, wide)]
    assert found[1] == pytest.approx(found[2], rel=0.01)


def test_the_readme_has_a_line_of_each_model():
    head, _, *lines = [line.strip("| ").split(" | ") for line in seconds.shown().splitlines()]
    assert head == seconds.HEADS
    assert [line[:2] for line in lines] == [[model.name, str(7 * model.blocks)] for model in MODELS]
