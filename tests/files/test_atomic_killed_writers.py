"""Kills run in a process of their own: a child of a process whose threads once ran may wait for them for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "support" / "runs" / "programs" / "killed_writers.py"


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute where nothing else runs
def test_killed_writers_leave_the_old_or_the_new_result() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        str(TESTS),
    ]
    run = subprocess.run(command, cwd=TESTS.parents[3], capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "7 passed" in run.stdout
