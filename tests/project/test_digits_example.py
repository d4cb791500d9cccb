"""What examples/digits.py reports is true, and holds against a baseline, counted calls and weights merged by hand."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_lora import load_from_checkpoint
from support.runs.examples import SHOWN, checkout, numbers, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory)


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, str]:
    return parse(run(folder, "digits"))


@pytest.fixture(scope="module")
def digits(folder: Path) -> ModuleType:
    """The example as a module, to build its network and read its data."""
    sys.path.insert(0, str(folder / "examples"))
    try:
        return importlib.import_module("digits")
    finally:
        sys.path.remove(str(folder / "examples"))


@pytest.fixture
def tuned(folder: Path, report: dict[str, str], digits: ModuleType) -> L.LightningModule:
    """The model that the example has trained and saved."""
    return load_from_checkpoint(digits.Digits, folder / "examples" / "runs" / "adapter.ckpt").eval()


def parse(printed: str) -> dict[str, str]:
    return dict(re.split(r": +", line) for line in printed.strip().splitlines())


@torch.no_grad()
def logits(module: nn.Module, images: Tensor) -> Tensor:
    outputs: Tensor = module.eval()(images)
    return outputs


def accuracy(module: nn.Module, data: Any) -> str:
    """On a TensorDataset, as the example prints it."""
    images, labels = data.tensors
    return f"{multiclass_accuracy(logits(module, images), labels, num_classes=10, average='micro'):.3f}"


def head_only(digits: ModuleType) -> nn.Module:
    """The baseline: the last layer alone, trained on the same images for as long."""
    torch.manual_seed(0)
    module = digits.Digits()
    optimizer = torch.optim.AdamW(module.cnn.head.parameters(), lr=module.learning_rate)
    for _ in range(60):
        for images, labels in digits.DigitsData().train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()
    result: nn.Module = module
    return result


def test_lora_learns_the_new_task_and_keeps_the_old(report, digits):
    before, lora, upright = (
        float(report[row])
        for row in ("mirrored digits, before", "mirrored digits, with LoRA", "upright digits, adapter disabled")
    )
    head = float(accuracy(head_only(digits), digits.splits(mirrored=True)["test"]))
    assert 0.3 < before < 0.55
    assert lora > 0.87
    assert lora > head + 0.03 > before + 0.3
    assert upright > 0.96
    assert float(report["upright digits, with LoRA"]) < 0.7


def test_accuracies_and_sizes_are_those_of_weights_merged_by_hand_and_of_the_file(report, tuned, digits, folder):
    state = {name.removeprefix("cnn."): value.double() for name, value in tuned.state_dict().items() if "cnn." in name}
    trained = 0
    for name in ("conv1", "conv2", "hidden", "head"):
        a, b = (state.pop(f"{name}.lora_{factor}").flatten(1) for factor in "AB")
        state[f"{name}.weight"] += 8 / 4 * (b @ a).view_as(state[f"{name}.weight"])
        trained += a.numel() + b.numel()
    hand_made = digits.CNN().double().eval()
    hand_made.load_state_dict(state)
    pretrained = digits.pretrained().double().eval()
    for module, mirrored, row in (
        (hand_made, True, "mirrored digits, with LoRA"),
        (hand_made, False, "upright digits, with LoRA"),
        (pretrained, True, "mirrored digits, before"),
        (pretrained, False, "upright digits, adapter disabled"),
    ):
        images, labels = digits.splits(mirrored)["test"].tensors
        right = module(images.double()).argmax(1) == labels
        assert report[row] == f"{right.double().mean():.3f}", row
    total = trained + sum(weight.numel() for weight in digits.CNN().parameters())
    assert report["trained"] == f"{trained:,} of {total:,} parameters"
    assert report["adapter.ckpt"] == f"{(folder / 'examples' / 'runs' / 'adapter.ckpt').stat().st_size:,} bytes"


def test_the_readme_shows_this_report(report):
    shown = parse(SHOWN["digits"])
    assert list(shown) == list(report)
    assert shown["trained"] == report["trained"]
    assert numbers(shown["adapter.ckpt"]) == pytest.approx(numbers(report["adapter.ckpt"]), rel=0.1)
    for row in shown:
        if "digits" in row:
            tolerance = 0.1 if row == "upright digits, with LoRA" else 0.03  # what it was not trained on varies more
            assert float(shown[row]) == pytest.approx(float(report[row]), abs=tolerance), row
