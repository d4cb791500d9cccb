"""PEFT's names of what lies in a module of which a parameter is adapted, as a layer in a Mamba mixer: both ways."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, merged, save_adapter
from support.models.methods import moved
from support.models.peers import TENSORS, close, seeded
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc, self.norm = nn.Parameter(torch.eye(8)), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.fc(F.linear(x, self.weight)))
        return result


class Mixer(nn.Module):
    """Has two parameters of its own, and layers of every kind beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.eye(8)), nn.Parameter(torch.eye(8))
        self.fc, self.inner, self.norm = nn.Linear(8, 8), Inner(), nn.LayerNorm(8)
        self.att, self.table = nn.MultiheadAttention(8, 2), nn.Embedding(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(F.linear(self.fc(F.linear(x, self.first)), self.second)) + self.table(torch.arange(len(x)))
        result: torch.Tensor = self.norm(self.att(x, x, x)[0])
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Mixer(), Mixer()), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layers(x))
        return result


X = torch.linspace(-1, 1, 48).sin().view(6, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "two parameters": {"target_modules": ["fc", "table"], "target_parameters": ["first", "second"], "bias": "all"},
    "full names": {"target_modules": ["layers.0.fc", "layers.1.inner.fc"], "target_parameters": ["0.first", "1.first"]},
    "the inner module": {"target_modules": r"layers\.\d\.fc", "target_parameters": ["inner.weight"]},
    "attention": {"target_modules": ["fc", "att"], "target_parameters": ["first"], "bias": "lora_only"},
    "attention elsewhere": {"target_modules": ["att"], "target_parameters": ["head.weight"]},
    "patterns": {"target_modules": ["fc"], "target_parameters": ["first"], "rank_pattern": {"0.fc": 3, "1.first": 2}},
    "deep modules_to_save": {
        "target_parameters": ["first"],
        "target_modules": ["fc"],
        "modules_to_save": ["inner.norm"],
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_folder_of_either_is_read_by_the_other_and_written_under_the_same_names(tmp_path, options: dict[str, Any]):
    theirs = moved(peft.get_peft_model(seeded(Net), peft.LoraConfig(r=4, **options))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours := seeded(Net), tmp_path / "theirs")
    close(ours(X), theirs(X))
    with merged(ours):
        close(ours(X), theirs(X))
    save_adapter(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    statistics = found.keys() - wanted.keys()
    assert wanted.keys() <= found.keys()
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in statistics)
    assert statistics <= theirs.state_dict().keys()  # so peft finds them
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    inject(own := seeded(Net), LoRAConfig(r=4, **options))
    save_adapter(moved(own).eval(), tmp_path / "own")
    close(peft.PeftModel.from_pretrained(seeded(Net), tmp_path / "own").eval()(X), own(X))
    load_adapter(again := seeded(Net), tmp_path / "own")
    assert torch.equal(again(X), own(X))
