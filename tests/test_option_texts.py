"""What an option means is written once: in the tables of the reference.

The docstrings of LoRAConfig and LoRACallback, which editors and `--help` read, have the first sentence of it.
WRITE_TABLE=1 in the environment writes them there.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRACallback, LoRAConfig

PACKAGE = Path(__file__).parents[1] / "lightning_lora"
REFERENCE = PACKAGE / "README.md"
SOURCES = {LoRAConfig: PACKAGE / "config.py", LoRACallback: PACKAGE / "callback.py"}
ROW = re.compile(r"^\| `(\w+)` \| `[^`]+` \| (.+) \|$", re.MULTILINE)
FIRST_SENTENCE = re.compile(r".+?\.(?= |$)")
LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
CONFIG = "at most one: a LoRAConfig, or a peft.LoraConfig, instead of its options one by one."  # no option of a table


def first_sentence(cell: str) -> str:
    """The first sentence of a table's cell, as a docstring has it: without links and marks of code."""
    return FIRST_SENTENCE.match(LINK.sub(r"\1", cell).replace("`", ""))[0]


def meanings(page: str) -> dict[str, str]:
    """The whole text of each option, by name."""
    return dict(ROW.findall(page))


def written(owner: type[Any]) -> str:
    """The lines below `Args:` of the class, a line an option, in the order of the signature."""
    texts = {name: first_sentence(cell) for name, cell in meanings(REFERENCE.read_text()).items()} | {"config": CONFIG}
    return "\n".join(f"        {name}: {texts[name]}" for name in inspect.signature(owner).parameters)


@pytest.mark.parametrize("owner", [LoRAConfig, LoRACallback])
def test_docstring_has_the_first_sentence_of_the_reference_in_a_line_each(owner: type[Any]):
    source = SOURCES[owner].read_text()
    before, begin, rest = source.partition(f"\nclass {owner.__name__}")
    head, args, rest = rest.partition("\n    Args:\n")
    entries, end, rest = rest.partition("\n\n")
    if os.environ.get("WRITE_TABLE"):
        entries = written(owner)
        SOURCES[owner].write_text("".join((before, begin, head, args, entries, end, rest)))
    assert entries == written(owner)
    assert max(map(len, entries.splitlines())) <= 120
    shown = inspect.getdoc(owner).splitlines()  # what editors read
    assert [line for line in entries.splitlines() if line.removeprefix("    ") not in shown] == []


def test_first_sentence_is_without_marks():
    cell = 'one of `"a"` and `[b]`, by DoRA ([arXiv:2402.09353](https://x.org)), as peft.LoraConfig. More: [x](y.md)'
    assert first_sentence(cell) == 'one of "a" and [b], by DoRA (arXiv:2402.09353), as peft.LoraConfig.'
