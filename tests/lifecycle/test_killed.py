"""A process killed at random moments and resumed ends where the uninterrupted one does, and leaves no broken file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert set(results) == {"adapter", "merged", "full"}
    assert sum(found["while writing"] for found in results.values()) >= 1
    for kind, found in results.items():
        assert len(set(found["resumed at"])) >= 3, f"{kind}: it was killed before it had saved anything new"
        folders = (tmp_path / kind, tmp_path / kind / "whole")
        final, whole = (torch.load(folder / "final.ckpt", weights_only=True) for folder in folders)
        for checkpoint in (final, whole):
            del checkpoint["callbacks"], checkpoint["loops"]  # paths of files; where the last epoch was taken up
        assert_same_tensors(final, whole)
