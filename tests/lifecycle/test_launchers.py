"""Launchers that start processes from the main one: with inject() before fit the adapter arrives there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("launched.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_the_adapter_arrives_in_the_main_process(results, strategy: str):
    found = results[strategy]
    assert found["trained"]
    assert found["arrived"]
    assert found["base"]
    assert not found["merged"]
    assert found["saved after"]
    assert len([name for name in found["saved"] if "lora" in name]) == 6
    assert not [name for name in found["saved"] if "lora" not in name and not name.startswith("body.1.")]


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_without_inject_it_is_refused_with_the_remedy(results, strategy: str):
    assert "Call inject(model, LoRAConfig(...)) before fit, or use strategy='ddp'." in results["refused"][strategy]


def test_the_callback_one_writes_first_loses_the_adapter(results):
    """It trains and saves one, but the model of the main process has none, and nothing says so."""
    assert len(results["lost"]["saved"]) == 6
    assert results["lost"]["arrived"] == []


def test_evaluation_needs_no_inject(results):
    assert results["validated"]["True"] == pytest.approx(results["validated"]["False"], rel=1e-5)


def test_verify_reports_the_largest_error_of_all_ranks(results):
    metrics = results["ddp_fork"]["metrics"]
    assert metrics["differs"] == 1, "the ranks agree; this shows nothing"
    assert metrics["lora_merge_error_max"] == metrics["expected"] > 0
