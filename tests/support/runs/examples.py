"""Run the programs in examples/ as users run them, and make the notebook out of finetune.py and small_models.py."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
README = ROOT / "examples" / "README.md"
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
BLOCK = re.compile(
    r"^```bash\n(?:pip [^\n]* && )?python (examples/(\w+)\.py[^\n]*)\n```\n\n```text\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMANDS = {name: command for command, name, _ in BLOCK.findall(README.read_text())}
SHOWN = {name: output for _, name, output in BLOCK.findall(README.read_text())}


SMALL_MODELS = "manual_llama", "manual_bert"  # folders that the examples make at the first call


def checkout(factory: pytest.TempPathFactory) -> Path:
    """Copy the examples into a new folder, without files of earlier runs."""
    folder = factory.mktemp("checkout")
    left = shutil.ignore_patterns("*.pt", "manual_*", "runs", "__pycache__")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=left)
    return folder


@contextmanager
def small_models_shared(folder: Path, beside: str = ".") -> Iterator[None]:
    """Give programs the small models that this run of pytest has already trained, and keep those that they train.

    Each takes half a minute, and each process of pytest-xdist has a folder of its own.

    Args:
        folder: a folder that pytest made for a test.
        beside: where in it small_models.py lies, which puts the models beside itself.
    """
    kept = folder.parents[1 if "PYTEST_XDIST_WORKER" in os.environ else 0] / "small_models"
    _copy_small_models(kept, folder / beside)
    yield
    _copy_small_models(folder / beside, kept)


def _copy_small_models(source: Path, target: Path) -> None:
    """Each appears whole, because another process may look for it."""
    target.mkdir(exist_ok=True)
    for name in SMALL_MODELS:
        if (source / name).exists() and not (target / name).exists():
            with TemporaryDirectory(dir=target) as partial:
                shutil.copytree(source / name, Path(partial, name))
                with suppress(OSError):  # another process was faster
                    Path(partial, name).rename(target / name)


def run(folder: Path, name: str, *options: str, timeout: float = 280) -> str:
    """Run an example by the command in the README, on one thread, and return what it prints, without Ray's notices."""
    command = [sys.executable, *shlex.split(COMMANDS[name]), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with small_models_shared(folder, "examples"):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return re.sub(r"^.*\(raylet\).*\n", "", done.stdout, flags=re.MULTILINE)  # of a worker that died


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def words(text: str) -> str:
    """A text in lower case and with single spaces, without numbers and without texts that a model generated."""
    return re.sub(r" +", " ", NUMBER.sub("0", unquoted(text))).lower()


def unquoted(text: str) -> str:
    """A text without quoted parts at the ends of lines: a model generated these."""
    return re.sub(r"(: )['\"].*['\"]$", r"\1", text, flags=re.MULTILINE)


def assert_alike(printed: str, shown: str, rel: float, tolerance: float) -> None:
    """Compare outputs of two machines: the words are the same, and numbers are close, relatively or absolutely."""
    assert words(printed) == words(shown)
    assert numbers(unquoted(printed)) == pytest.approx(numbers(unquoted(shown)), rel=rel, abs=tolerance)


INSTALL = """%pip install -q "lightning-lora[examples]"
# It is not on PyPI yet: in a clone of the repository, run pip install -e ".[examples]" before this"""
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
        f"# Fine-tuning with LoRA\n\n{badge}{title}\n\n{task}\n\nYou can interrupt the cell that trains. Run again, it "
        f"goes on from the last epoch. In [Colab]({COLAB}) open this file with File, Upload notebook."
    )
    cells = [
        _text(intro),
        _code(INSTALL),
        _text("A small model and texts, so that nothing is downloaded."),
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
