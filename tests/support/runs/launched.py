"""One run of the launchers serves several tests."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the launchers' fits gave, made by whichever of pytest's processes needs it first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all of pytest's processes share
    results = folder / "launched" / "results.json"
    results.parent.mkdir(exist_ok=True)
    with (results.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            launch(results.parent)
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def launch(folder: Path) -> None:
    command = [sys.executable, "-m", "support.runs.programs.launched_fits", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
