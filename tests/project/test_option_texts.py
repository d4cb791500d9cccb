"""An option is written once: its type and default in LoRAConfig, its meaning in the tables of the reference.

The docstrings of LoRAConfig and LoRACallback, which editors and `--help` read, have the first sentence of the meaning.
LoRACallback's signature, which editors, type checkers and LightningCLI read, repeats LoRAConfig's options.
`WRITE_TABLE=1 pytest -n 0 tests/project/test_option_texts.py` writes both there.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRACallback, LoRAConfig

PACKAGE = Path(__file__).parents[2] / "lightning_lora"
REFERENCE = PACKAGE / "README.md"
SOURCES = {LoRAConfig: PACKAGE / "config.py", LoRACallback: PACKAGE / "callback.py"}
ROW = re.compile(r"^\| `(\w+)` \| `[^`]+` \| (.+) \|$", re.MULTILINE)
FIRST_SENTENCE = re.compile(r".+?\.(?= |$)")
LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
BEFORE_OPTIONS = "        *config: LoRAConfig | PeftConfig,\n"
USUAL, USUAL_OWN = 6, 2  # the first options, which most users give
CONFIG = "at most one: a LoRAConfig, or a peft.LoraConfig, instead of its options one by one."  # no option of a table


def first_sentence(cell: str) -> str:
    """The first sentence of a table's cell, as a docstring has it: without links and marks of code."""
    return FIRST_SENTENCE.match(LINK.sub(r"\1", cell).replace("`", ""))[0]


def meanings(page: str) -> dict[str, str]:
    """The whole text of each option, by name."""
    return dict(ROW.findall(page))


def options_of_the_config() -> dict[str, str]:
    """LoRAConfig's options as parameters of another function, a line each, by name."""
    source = SOURCES[LoRAConfig].read_text()
    (config,) = (each for each in ast.parse(source).body if getattr(each, "name", "") == "LoRAConfig")
    options: dict[str, str] = {}
    for each in config.body:
        if isinstance(each, ast.AnnAssign):  # name: type = field(default=..., metadata=...)
            (default,) = (word.value for word in each.value.keywords if word.arg == "default")
            texts = (ast.get_source_segment(source, part) for part in (each.target, each.annotation, default))
            options[each.target.id] = "        {}: {} = {},\n".format(*texts)
    return options


def written_signature(lines: list[str]) -> list[str]:
    """The options of the callback: the usual ones of the config, the usual ones of its own, the others."""
    whole = options_of_the_config()
    own = [line for line in lines if name_in(line) not in whole]
    options = list(whole.values())
    return [*options[:USUAL], *own[:USUAL_OWN], *options[USUAL:], *own[USUAL_OWN:]]


def name_in(line: str) -> str:
    return line.partition(":")[0].strip()


def test_signature_of_the_callback_repeats_the_options_of_the_config():
    source = SOURCES[LoRACallback].read_text()
    before, begin, rest = source.partition(BEFORE_OPTIONS)
    lines, end, rest = rest.partition("    ) -> None:\n")
    expected = "".join(written_signature(lines.splitlines(keepends=True)))
    if os.environ.get("WRITE_TABLE"):
        SOURCES[LoRACallback].write_text("".join((before, begin, lines := expected, end, rest)))
    assert lines == expected, "WRITE_TABLE=1 pytest -n 0 tests/project/test_option_texts.py writes the options there"


def names(owner: type[Any]) -> list[str]:
    if owner is LoRAConfig:
        return list(options_of_the_config())
    lines = SOURCES[owner].read_text().partition(BEFORE_OPTIONS)[2].partition("    ) -> None:\n")[0]
    return ["config", *map(name_in, lines.splitlines())]


def written(owner: type[Any]) -> str:
    """The lines below `Args:` of the class, a line an option, in the order of the signature."""
    texts = {name: first_sentence(cell) for name, cell in meanings(REFERENCE.read_text()).items()} | {"config": CONFIG}
    return "\n".join(f"        {name}: {texts[name]}" for name in names(owner))


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
