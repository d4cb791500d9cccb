"""What an option means is written once: in LoRAConfig's docstring, or in LoRACallback's for the callback's own options.

LoRACallback's docstring repeats the texts of LoRAConfig, because editors and `--help` read it, and so do the tables of
the reference. WRITE_TABLE=1 in the environment writes both from the source.
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
CONFIG, CALLBACK, REFERENCE = PACKAGE / "config.py", PACKAGE / "callback.py", PACKAGE / "README.md"
CODE = re.compile(  # in a text: what a table shows as code
    r'"[^"]*"|\{"[^}]*\}|\b[a-z]+="\w+"|\b[a-z]+(?:_[a-z\d]+)+|\b(?:nn|torch|peft)\.\w+|--[a-z]+|\bLoRA(?:Config|Callback)\b'
)


def arguments(source: str) -> str:
    """The lines below `Args:` in the docstring of the class, as they stand in the file."""
    return source.partition("\nclass LoRA")[2].partition("\n    Args:\n")[2].partition("\n\n")[0]


def texts(source: str) -> dict[str, str]:
    """The text of each option, in one line."""
    entries = re.split(r"^ {8}(?=\w)", arguments(source), flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in (entry.split(": ", 1) for entry in entries)}


def shared(source: str) -> str:
    """The entries of the options that LoRAConfig has, as they stand in the file."""
    lines = arguments(source)
    return lines[re.search(r"^ {8}r: ", lines, re.MULTILINE).start() :]


def as_cell(text: str) -> str:
    """The text as a table shows it: names and values as code, papers as links."""
    marked = CODE.sub(lambda match: f"`{match[0]}`", text)
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", marked)


def table(head: str, options: dict[str, tuple[Any, str]], page: str) -> str:
    """The rows of a table of options; what a row of the page links at its end ("More: ...") stays."""
    lines = [f"| {head} | default | meaning |", "|---|---|---|"]
    for name, (default, text) in options.items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        more = re.search(rf"^\| `{name}` \|.*?( More: \[.*\)) \|$", page, re.MULTILINE)
        lines.append(f"| `{name}` | `{shown}` | {as_cell(text)}{more[1] if more else ''} |")
    return "\n".join(lines) + "\n"


def tables(page: str) -> dict[str, str]:
    """Both tables of the reference, by the name of their markers."""
    defaults = {name: each.default for name, each in inspect.signature(LoRACallback).parameters.items()}
    config = {name: (defaults[name], text) for name, text in texts(CONFIG.read_text()).items()}
    own = {
        name: (defaults[name], text)
        for name, text in texts(CALLBACK.read_text()).items()
        if name not in config and name != "config"
    }
    return {"options": table("option", config, page), "callback": table("option of the callback", own, page)}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by tests/test_option_texts.py -->\n", f"<!-- end of {name} -->\n"


def test_callback_says_of_each_option_what_the_config_says():
    config, callback = CONFIG.read_text(), CALLBACK.read_text()
    if os.environ.get("WRITE_TABLE"):
        CALLBACK.write_text(callback := callback.replace(shared(callback), shared(config)))
    assert shared(callback) == shared(config)
    for owner, source in ((LoRAConfig, config), (LoRACallback, callback)):  # what is read here is what editors read
        shown = " ".join(inspect.getdoc(owner).split())
        assert [name for name, text in texts(source).items() if f"{name}: {text}" not in shown] == []


@pytest.mark.parametrize("name", ["options", "callback"])
def test_table_of_the_reference_says_of_each_option_what_the_docstring_says(name: str):
    page = REFERENCE.read_text()
    begin, end = markers(name)
    before, rest = page.split(begin)
    written = f"{before}{begin}\n{tables(page)[name]}\n{end}{rest.split(end)[1]}"
    if os.environ.get("WRITE_TABLE"):
        REFERENCE.write_text(page := written)
    assert page == written


def test_cell_shows_values_and_papers():
    text = 'a list, such as {"q": 16}, or "none" in modules_to_save (nn.Linear, arXiv:2312.03732); save="full"'
    assert as_cell(text) == (
        'a list, such as `{"q": 16}`, or `"none"` in `modules_to_save` '
        '(`nn.Linear`, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)); `save="full"`'
    )
