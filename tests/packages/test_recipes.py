"""The programs in examples/migrating.md run as they stand, each where the package is installed that it comes from."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from support.notices import PEER_NOTICES

PAGE = Path(__file__).parents[2] / "examples" / "migrating.md"
SECTIONS = re.split(r"^#{2,3} ", PAGE.read_text(), flags=re.M)[1:]
PROGRAM = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.M | re.S)
RECIPES = {section.split("\n")[0]: PROGRAM.findall(section)[0] for section in SECTIONS if "```python" in section}
NEEDS = {
    "A LightningModule with get_peft_model": "peft",
    "From litgpt": "litgpt",
    "From terratorch": "terratorch",
    "From NeMo": "nemo",
}

NOTICES = (
    "ignore:The ``compute`` method of metric",  # of terratorch's metrics before the first batch
    "ignore:`torch.jit.script_method` is deprecated",  # of what NeMo imports
)

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES, *NOTICES)


@pytest.mark.parametrize(
    "title",
    [pytest.param(each, marks=[] if each.startswith("A ") else [pytest.mark.packages]) for each in NEEDS],
)
def test_recipe_runs_and_prints_what_the_page_says(tmp_path, monkeypatch, title):
    pytest.importorskip(NEEDS[title])
    monkeypatch.chdir(tmp_path)
    code, output = RECIPES[title]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, title, "exec"), {"__name__": "recipe"})
    assert out.getvalue() == output


def test_every_recipe_is_run():
    assert RECIPES.keys() == NEEDS.keys()
