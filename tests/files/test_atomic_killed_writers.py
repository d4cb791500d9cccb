"""Kills run in processes of their own: a child of a process whose threads once ran may wait for them for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "support" / "runs" / "programs" / "killed_writers.py"


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute where nothing else runs
@pytest.mark.parametrize(
    "name",
    [
        "test_killed_save_adapter_leaves_old_or_new_files",
        "test_killed_merge_leaves_old_or_new_files",
        "test_killed_first_save_leaves_a_complete_result_or_none",
        "test_signals_whose_handlers_raise_leave_all_of_w_or_all_of_w_prime",
    ],
)
def test_killed_writer_leaves_the_old_or_the_new_result(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", f"{TESTS}::{name}"]
    run = subprocess.run(command, cwd=TESTS.parents[3], capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
