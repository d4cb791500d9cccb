"""Buffers of a LightningModule outside the adapted network: checkpoints hold them, and folders name what they lack."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_lora import export_adapter, load_adapter, save_adapter, unload
from support.files.expected_weights import merge_and_check
from support.runs.training import (
    CLASSES,
    FEATURES,
    Net,
    assert_same_tensors,
    fit_model,
    inputs,
    own_random_stream,
)
from support.runs.with_callback import lora

TARGETS = r"(.*\.)?encoder\.[03]"
SEEN = {f"momentum.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")} | {"criterion.weight"}


class Contrast(Net):
    """A network that is adapted, its momentum copy with BatchNorm, and a loss with weights for each class."""

    def prepare(self) -> None:
        with own_random_stream(1):
            self.network = nn.Module()
            self.network.encoder = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
            )
        self.momentum = copy.deepcopy(self.network.encoder).requires_grad_(False)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network.encoder(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.momentum(batch[0] + 1)
        self.criterion.weight.mul_(1.25)
        return self.criterion(self(batch[0]), batch[1])


class Other(Contrast):
    """Another class around the same network, which calls it by another name and has its own loss."""

    def prepare(self) -> None:
        super().prepare()
        self.net, self.criterion.weight = self.network, torch.full((CLASSES,), 7.0)
        del self.network, self.momentum


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Contrast:
    path = tmp_path_factory.mktemp("tuned")
    model = Contrast()
    fit_model(path, model, lora(target_modules=TARGETS), saved=path / "a.ckpt")
    model.file = path / "a.ckpt"  # type: ignore[assignment]
    return model


def outside(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name in SEEN}


def network_outputs(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network.eval().encoder(inputs())  # type: ignore[operator]
    return result


def test_folder_names_what_lies_outside_the_network_and_loads_without_it(tmp_path, caplog, tuned: Contrast):
    with caplog.at_level(logging.INFO, "lightning_lora"):
        save_adapter(tuned, tmp_path / "a")
        export_adapter(tuned.file, tmp_path / "b")
    assert len(re.findall(r"momentum\.1\.running_mean, .* lies outside .*'s network", caplog.text)) == 2
    expected = network_outputs(tuned.network)
    bare, other, same = Contrast().network, Other(), Contrast()
    for model, network, folder in ((bare, bare, "a"), (other, other.net, "b"), (same, same.network, "a")):
        load_adapter(model, tmp_path / folder)
        assert torch.equal(network_outputs(network), expected)
    assert other.criterion.weight.tolist() == [7.0] * CLASSES
    assert_same_tensors(outside(same), outside(Contrast()))
    theirs = peft.PeftModel.from_pretrained(Contrast().network, tmp_path / "a")
    torch.testing.assert_close(network_outputs(theirs.base_model.model), expected)


def test_checkpoint_brings_back_what_lies_outside_the_network(tmp_path, tuned: Contrast):
    load_adapter(loaded := Contrast(), tuned.file)
    assert outside(loaded).keys() == SEEN
    assert_same_tensors(dict(loaded.state_dict()), dict(tuned.state_dict()))
    torch.save(Contrast().state_dict(), tmp_path / "base.pt")
    merge_and_check(tmp_path / "base.pt", tuned.file, tmp_path / "merged.pt")
    unload(loaded)
    assert_same_tensors(dict(loaded.state_dict()), dict(Contrast().state_dict()))
