"""The files of one adapter, byte for byte, so that a change of what other programs read is noticed."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import load_adapter, merge_and_unload, save_adapter, save_merged
from support.runs.training import assert_same_tensors

GOLDEN = Path(__file__).parent / "golden"


class Network(nn.Module):
    """One layer of most kinds, a BatchNorm and a head. The adapter of the golden files was trained on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = Network()


@pytest.fixture
def model() -> Net:
    load_adapter(module := Net(), GOLDEN / "peft")
    return module


def test_the_peft_folder_is_written_again_byte_for_byte(tmp_path, model: Net):
    save_adapter(model, tmp_path / "peft")
    for file in (GOLDEN / "peft").iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes(), file.name


def test_merged_weights_are_written_again_byte_for_byte(tmp_path, model: Net):
    save_merged(model, tmp_path / "merged")
    golden = GOLDEN / "merged" / "model.safetensors"
    assert (tmp_path / "merged" / golden.name).read_bytes() == golden.read_bytes()
    merge_and_unload(model)
    assert_same_tensors(load_file(golden), dict(model.state_dict()))
