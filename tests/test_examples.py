"""The example runs as its user runs it, and what it reports is true."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMAND = ("examples/digits.py", "fit", "--config", "examples/digits.yaml")
EXACT_ROWS = ("trainer.validate", "parameters", "checkpoint, same")  # the same on every machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without the pretrained weights and checkpoints of earlier runs."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(
        ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.pt", "runs", "__pycache__")
    )
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, str]:
    start = time.monotonic()
    rows = run(folder)
    assert time.monotonic() - start < 120
    return rows


@pytest.fixture(scope="module")
def unmerged_report(folder: Path, report: dict[str, str]) -> dict[str, str]:
    return run(folder, "--lora.merged_eval=false")


@pytest.fixture(scope="module")
def digits(folder: Path) -> ModuleType:
    """The example as a module, to build its network and read its data."""
    sys.path.insert(0, str(folder / "examples"))
    try:
        return importlib.import_module("digits")
    finally:
        sys.path.remove(str(folder / "examples"))


def run(folder: Path, *options: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, *COMMAND, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def parse(text: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.strip().splitlines())


def number(text: str) -> float:
    return float(re.match(r"[\d.,e+-]+", text).group().replace(",", ""))


def test_lora_learns_the_new_task_and_keeps_the_old(report):
    before, head, lora, upright = (
        number(report[row])
        for row in (
            "mirrored digits, before",
            "mirrored digits, only the head trained",
            "mirrored digits, LoRA",
            "upright digits, adapter disabled",
        )
    )
    assert 0.3 < before < 0.55
    assert lora > 0.87
    assert lora > head + 0.03 > before + 0.3
    assert upright > 0.96


def test_merging_changes_no_prediction(report):
    assert report["mirrored digits, LoRA merged"] == report["mirrored digits, LoRA"]
    assert report["trainer.test, accuracy"] == report["mirrored digits, LoRA"]
    effect = number(report["outputs: largest change by the adapter"])
    assert effect > 100 * number(report["outputs: largest change by merging"]) > 0


def test_the_trainer_evaluated_merged(report, digits):
    layers = len(adapted(digits))
    assert number(report["trainer.validate, batches"]) == 2
    assert number(report["trainer.validate, factored forward calls"]) == 0
    assert number(report["trainer.validate, base forward calls"]) == layers * 2


def test_merged_eval_can_be_turned_off_and_is_as_accurate(report, unmerged_report, digits):
    layers = len(adapted(digits))
    assert number(unmerged_report["trainer.validate, factored forward calls"]) == layers * 2
    assert number(unmerged_report["trainer.validate, base forward calls"]) == layers * 2
    for row in ("trainer.test, accuracy", "mirrored digits, LoRA", "mirrored digits, LoRA merged"):
        assert unmerged_report[row] == report[row]


def test_sizes_are_those_of_the_files(report, folder, digits):
    weights = dict(digits.CNN().named_parameters())
    shapes = [weights[f"{name}.weight"].flatten(1).shape for name in adapted(digits)]
    trainable = sum(4 * sum(shape) for shape in shapes)
    total = trainable + sum(weight.numel() for weight in weights.values())
    assert report["parameters, trainable"] == f"{trainable:,} of {total:,} ({trainable / total:.1%})"
    for kind in ("adapter", "full"):
        size = (folder / "examples" / "runs" / f"{kind}.ckpt").stat().st_size
        assert report[f"checkpoint, {kind}"] == f"{size:,} bytes"
    assert number(report["checkpoint, adapter"]) * 4 < number(report["checkpoint, full"])
    assert report["checkpoint, same outputs when loaded"] == "True"


def test_accuracies_are_those_of_weights_merged_by_hand(report, folder, digits):
    state = torch.load(folder / "examples" / "runs" / "full.ckpt", weights_only=True)["state_dict"]
    state = {name.removeprefix("cnn."): value.double() for name, value in state.items() if name.startswith("cnn.")}
    for name in adapted(digits):
        delta = state.pop(f"{name}.lora_B").flatten(1) @ state.pop(f"{name}.lora_A").flatten(1)
        state[f"{name}.weight"] += 8 / 4 * delta.view_as(state[f"{name}.weight"])
    hand_made = digits.CNN().double().eval()
    hand_made.load_state_dict(state)
    images, labels = digits.upright_splits()["test"]
    for module, sight, row in (
        (hand_made, images.flip(-1), "mirrored digits, LoRA"),
        (digits.pretrained().double().eval(), images.flip(-1), "mirrored digits, before"),
        (digits.pretrained().double().eval(), images, "upright digits, adapter disabled"),
    ):
        right = module(sight.double()).argmax(1) == labels
        assert report[row] == f"{right.double().mean():.3f}", row


def test_the_parts_of_the_data_are_disjoint(digits):
    parts = digits.upright_splits()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {
        "test": 500,
        "validate": 200,
        "adapt": 100,
        "pretrain": len(digits.load_digits().target) - 800,
    }
    images = torch.cat([images for images, _ in parts.values()])
    assert len(images.unique(dim=0)) == len(images)


def test_the_readme_shows_this_report(report):
    text = (ROOT / "examples" / "README.md").read_text()
    shown = parse(re.search(r"```text\n(mirrored digits, before.*?)```", text, re.DOTALL).group(1))
    assert list(shown) == list(report)
    for row, value in shown.items():
        if row.startswith(EXACT_ROWS):
            assert value == report[row]
        elif row.startswith("checkpoint"):
            assert number(value) == pytest.approx(number(report[row]), rel=0.1), row
        elif not row.startswith("outputs"):
            assert number(value) == pytest.approx(number(report[row]), abs=0.03), row


def adapted(digits: ModuleType) -> list[str]:
    return [name for name, layer in digits.CNN().named_children() if not isinstance(layer, torch.nn.BatchNorm2d)]
