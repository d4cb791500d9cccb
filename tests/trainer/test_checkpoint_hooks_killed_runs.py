"""A process killed at a random moment and resumed ends as the uninterrupted one, and leaves no broken file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from support.runs.training import assert_same_tensors


@pytest.mark.slow
def test_run_killed_and_resumed_ends_as_the_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "support.runs.programs.killed_runs", str(tmp_path), "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
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
