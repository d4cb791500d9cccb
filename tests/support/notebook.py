"""examples/finetune.ipynb, made out of finetune.py and small_models.py: one cell for each part of the program."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from typing import Any

INSTALL = """%pip install -q "lightning-lora[examples]"
# No package index has it yet: in a checkout, run pip install -e ".[examples]" before this"""
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"\[!\[Open in Colab\]\(\S+\)\]\(\S+/github/([\w.-]+/[\w.-]+)/blob/main/examples/finetune\.ipynb\)")


def notebook(program: str, small_models: str, repository: str = "") -> str:
    """Return the notebook's JSON.

    Args:
        program: the text of finetune.py.
        small_models: the text of small_models.py, which the notebook writes beside itself.
        repository: "owner/name" on GitHub, which Colab opens the notebook from; "" for no badge.
    """
    tree = ast.parse(program)
    title, _, rest = (ast.get_docstring(tree) or "").partition("\n\n")
    task = rest.rpartition("\n\n")[2]
    link = f"{COLAB}/github/{repository}/blob/main/examples/finetune.ipynb"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})\n\n" if repository else ""
    intro = (
        f"# Fine-tuning with LoRA\n\n{badge}{title}\n\n{task}\n\nInterrupt the cell that trains at any time; when it "
        f"runs again, it goes on from the last epoch. In [Colab]({COLAB}) open this file with File, Upload notebook."
    )
    cells = [
        _text(intro),
        _code(INSTALL),
        _text("A small model and texts that stand in for those of a hub, so that nothing is downloaded."),
        _code(f"%%writefile small_models.py\n{small_models}", hidden=True),
        *_parts(program, tree),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def repository_of(text: str) -> str:
    """Return the repository in a notebook's badge, or "" where it has none."""
    found = BADGE.search(text)
    return found[1] if found else ""


def _parts(program: str, tree: ast.Module) -> list[dict[str, Any]]:
    """Return the cells: imports and constants, each class and function, each step of the main part."""
    lines, cells, start = program.splitlines(), [], None
    *definitions, main = tree.body[1:]
    for node in definitions:
        start = node.lineno if start is None else start
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            before = "\n".join(lines[start - 1 : node.lineno - 1]).strip()
            cells += [_code(before)] if before else []
            cells.append(_code("\n".join(lines[node.lineno - 1 : node.end_lineno])))
            start = node.end_lineno + 1 if node.end_lineno else None
    steps = textwrap.dedent("\n".join(lines[main.lineno :]))
    for step in re.split(r"^# (?=[A-Z])", steps, flags=re.MULTILINE)[1:]:
        heading, _, code = step.partition("\n")
        cells += [_text(f"## {heading}"), _code(code.strip())]
    return cells


def _text(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(code: str, *, hidden: bool = False) -> dict[str, Any]:
    metadata = {"jupyter": {"source_hidden": True}, "cellView": "form"} if hidden else {}
    source = code.strip("\n").splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": [], "source": source}
