"""Run the programs in examples/ as users run them, and compare their output with examples/README.md."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "README.md"
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
BLOCK = re.compile(
    r"^```bash\n(?:pip [^\n]* && )?python (examples/(\w+)\.py[^\n]*)\n```\n\n```text\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMANDS = {name: command for command, name, _ in BLOCK.findall(README.read_text())}
SHOWN = {name: output for _, name, output in BLOCK.findall(README.read_text())}


def checkout(folder: Path) -> Path:
    """Copy the examples, without files of earlier runs."""
    left = shutil.ignore_patterns("*.pt", "manual_*", "runs", "__pycache__")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=left)
    return folder


def run(folder: Path, name: str, *options: str, timeout: float = 280) -> str:
    """Run an example by the command in the README, on one thread, and return what it prints, without Ray's notices."""
    command = [sys.executable, *shlex.split(COMMANDS[name]), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
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
