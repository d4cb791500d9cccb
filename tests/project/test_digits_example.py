"""What examples/digits.py reports is true, and holds against a baseline, counted calls and weights merged by hand."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import Mock, patch

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_lora import LoRACallback, disable_adapter, load_from_checkpoint, merged
from lightning_lora.nn.conv import LoRAConv
from lightning_lora.nn.linear import LoRALinear
from support.examples import SHOWN, checkout, numbers, run

pytestmark = pytest.mark.slow

LAYERS = ("conv1", "conv2", "hidden", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("checkout"))


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


def make_trainer(**options: Any) -> L.Trainer:
    """A Trainer that adopts the adapted model."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=[LoRACallback(**options)],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )


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


def test_merging_changes_no_prediction(report, tuned, digits):
    """The Trainer of the example has evaluated merged."""
    test = digits.splits(mirrored=True)["test"]
    images = test.tensors[0]
    assert accuracy(tuned, test) == report["mirrored digits, with LoRA"]
    factored = logits(tuned, images)
    with merged(tuned):
        assert accuracy(tuned, test) == report["mirrored digits, with LoRA"]
        difference = (logits(tuned, images) - factored).abs().max()
    with disable_adapter(tuned):
        effect = (logits(tuned, images) - factored).abs().max()
    assert effect > 100 * difference > 0


@contextmanager
def counting(*methods: tuple[type, str]) -> Iterator[list[Mock]]:
    """Count calls of methods, which work as before."""
    with ExitStack() as stack:
        spies = [patch.object(cls, name, autospec=True, side_effect=getattr(cls, name)) for cls, name in methods]
        yield [stack.enter_context(spy) for spy in spies]


@pytest.mark.parametrize("merged_eval", [True, False])
def test_the_trainer_evaluates_merged_unless_told_otherwise(tuned, digits, report, merged_eval: bool):
    data = digits.DigitsData()
    assert len(data.val_dataloader()) == 2
    trainer = make_trainer(merged_eval=merged_eval)
    with (
        counting((LoRAConv, "factored_forward"), (LoRALinear, "factored_forward")) as factored,
        counting((nn.Conv2d, "forward"), (nn.Linear, "forward")) as base,
    ):
        trainer.validate(tuned, data, verbose=False)
    assert sum(mock.call_count for mock in factored) == (0 if merged_eval else len(LAYERS) * 2)
    assert sum(mock.call_count for mock in base) == len(LAYERS) * 2
    tested = trainer.test(tuned, data, verbose=False)[0]["accuracy"]
    assert f"{tested:.3f}" == report["mirrored digits, with LoRA"]


def test_merged_eval_can_be_turned_off_on_the_command_line_and_is_as_accurate(folder, report, tmp_path):
    unmerged = parse(run(folder, "digits", "--lora.merged_eval=false", f"--trainer.default_root_dir={tmp_path}"))
    assert unmerged == report


def save(module: L.LightningModule, data: L.LightningDataModule, kind: Literal["adapter", "full"], path: Path) -> Path:
    """A checkpoint of that kind, without optimizer."""
    trainer = make_trainer(save=kind)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(path / f"{kind}.ckpt", weights_only=True)
    return path / f"{kind}.ckpt"


def test_sizes_are_those_of_the_files(report, folder, tuned, digits, tmp_path):
    weights = dict(digits.CNN().named_parameters())
    shapes = [weights[f"{name}.weight"].flatten(1).shape for name in LAYERS]
    trained = sum(4 * sum(shape) for shape in shapes)
    total = trained + sum(weight.numel() for weight in weights.values())
    assert report["trained"] == f"{trained:,} of {total:,} parameters"
    size = (folder / "examples" / "runs" / "adapter.ckpt").stat().st_size
    assert report["adapter.ckpt"] == f"{size:,} bytes"
    adapter, full = (save(tuned, digits.DigitsData(), kind, tmp_path) for kind in ("adapter", "full"))
    assert adapter.stat().st_size == pytest.approx(size, rel=0.05)
    assert adapter.stat().st_size * 4 < full.stat().st_size
    images = digits.splits(mirrored=True)["test"].tensors[0]
    for path in (adapter, full):
        assert torch.equal(logits(load_from_checkpoint(digits.Digits, path), images), logits(tuned, images))


def test_accuracies_are_those_of_weights_merged_by_hand(report, tuned, digits, tmp_path):
    path = save(tuned, digits.DigitsData(), "full", tmp_path)
    state = torch.load(path, weights_only=True)["state_dict"]
    state = {name.removeprefix("cnn."): value.double() for name, value in state.items() if name.startswith("cnn.")}
    for name in LAYERS:
        delta = state.pop(f"{name}.lora_B").flatten(1) @ state.pop(f"{name}.lora_A").flatten(1)
        state[f"{name}.weight"] += 8 / 4 * delta.view_as(state[f"{name}.weight"])
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


def test_the_parts_of_the_data_are_disjoint(digits):
    parts = digits.splits(mirrored=False)
    assert {name: len(part) for name, part in parts.items()} == {
        "test": 500,
        "validate": 200,
        "train": 100,
        "pretrain": len(digits.load_digits().target) - 800,
    }
    images = torch.cat([part.tensors[0] for part in parts.values()])
    assert len(images.unique(dim=0)) == len(images)


def test_the_readme_shows_this_report(report):
    shown = parse(SHOWN["digits"])
    assert list(shown) == list(report)
    assert shown["trained"] == report["trained"]
    assert numbers(shown["adapter.ckpt"]) == pytest.approx(numbers(report["adapter.ckpt"]), rel=0.1)
    for row in shown:
        if "digits" in row:
            tolerance = 0.1 if row == "upright digits, with LoRA" else 0.03  # what it was not trained on varies more
            assert float(shown[row]) == pytest.approx(float(report[row]), abs=tolerance), row
