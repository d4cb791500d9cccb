"""What PEFT inside a LightningModule does and the callback does, in small; the pages show what was measured."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import peft_in_module
import pytest
from peft_in_module import OTHER, SAME

import report
from support.runs.notices import PEER_NOTICES

FRONT = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(peft_in_module.RESULTS.read_text())
    return content


@pytest.mark.slow
@pytest.mark.filterwarnings(*PEER_NOTICES, "ignore:Be aware that when using `ckpt_path`", "ignore:Found keys that are")
def test_each_candidate_does_what_the_page_says(kept: dict[str, Any]):
    found = peft_in_module.measured(width=32, batches=1, seconds=0)
    assert [row["candidate"] for row in found["rows"]] == [row["candidate"] for row in kept["rows"]]
    alone, saving, hooks, ours = found["rows"]
    for row, known in zip(found["rows"], kept["rows"], strict=True):
        same = ("lines", "names kept", "names", "resumed", "on another base")
        assert [row[figure] for figure in same] == [known[figure] for figure in same]
    assert alone["bytes"] > hooks["bytes"] == saving["bytes"]
    assert ours["bytes"] == pytest.approx(hooks["bytes"], rel=0.05)
    assert (ours["BatchNorm"], alone["BatchNorm"], saving["BatchNorm"]) == (0, 0, "RuntimeError")
    assert hooks["BatchNorm"] > 0.1
    assert (hooks["on another base"], ours["on another base"]) == (OTHER, "LoRAError")
    assert {alone["resumed"], hooks["resumed"], ours["resumed"]} == {SAME}
    for each in found["validation"]:
        assert min(each["ms"], each["PEFT / plain"], each["LoRACallback / plain"]) > 0


def test_the_page_shows_the_results_that_are_kept(kept: dict[str, Any]):
    shown = report.README.read_text().split(peft_in_module.BEGIN)[1].split(peft_in_module.END)[0]
    assert shown.strip() == peft_in_module.markdown(kept)


def test_the_red_lines_of_the_front_page_are_the_candidate_with_both_hooks():
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", FRONT.read_text(), re.MULTILINE | re.DOTALL)
    red = [line[1:].strip() for line in diff.splitlines() if line.startswith("-") and "L.Trainer" not in line]
    source = inspect.getsource(peft_in_module.PeftAndHooks).replace(": dict[str, Any]) -> None:", "):")
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    assert red == lines[lines.index("super().__init__()") + 1 :]
    assert len(red) == peft_in_module.lines_of("PEFT and both hooks")
