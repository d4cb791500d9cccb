"""Weights on disk in each form that the command takes, and what is no such form."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged_state_dict, save_adapter
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.files.weights import Weights
from support.files.expected_weights import merge_and_check
from support.runs.notices import quiet_peers
from support.runs.training import Net, assert_same_tensors
from support.runs.with_callback import TARGETS

pytestmark = quiet_peers


def test_every_tensor_that_shares_bytes_is_found():
    """Against comparing each with each: tensors inside others, at their ends, one after another, and empty ones."""
    shared = 0
    for seed in range(200):
        draw = random.Random(seed)
        storage = torch.zeros(40)
        spans = {
            str(i): (draw.randrange(30), draw.randrange(6), draw.randrange(1, 3)) for i in range(draw.randrange(9))
        }
        tensors = {name: storage.as_strided((count,), (step,), start) for name, (start, count, step) in spans.items()}
        taken = {
            n: range(start, start + (count - 1) * step + 1 if count else start)
            for n, (start, count, step) in spans.items()
        }
        tied = Weights(Path("x"), "torch", tensors).tied()
        for name, other in itertools.combinations(taken, 2):
            if set(taken[name]) & set(taken[other]):
                assert {name, other} <= tied[name] & tied[other]
        alone = {n for n in taken if not any(n != m and set(taken[n]) & set(taken[m]) for m in taken)}
        assert tied.keys() == taken.keys() - alone
        shared += len(tied)
    assert shared > 200


@pytest.fixture
def plain_adapter(tmp_path: Path) -> Path:
    """An adapter for Net as it is built."""
    net = Net()
    inject(net, LoRAConfig(r=2, init_lora_weights=False, target_modules=TARGETS))
    save_adapter(net, tmp_path / "plain")
    return tmp_path / "plain"


def state_with(**tensors: Any) -> dict[str, torch.Tensor]:
    return Net().state_dict() | tensors


@pytest.mark.parametrize("form", ["out of order", "as before torch 1.6", "views of one storage"])
def test_a_state_dict_is_merged_however_its_tensors_are_stored(tmp_path, plain_adapter: Path, form: str):
    owner = f"{TARGETS[0]}.weight"
    state, options = state_with(), {"_use_new_zipfile_serialization": form != "as before torch 1.6"}
    if form == "out of order":
        state[owner] = state[owner].T.contiguous().T
    if form == "views of one storage":  # as a recurrent layer's weights on a GPU
        flat, start = torch.cat([value.float().view(-1) for value in state.values()]), 0
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = flat[start : start + value.numel()].view(value.shape).copy_(value)
                start += value.numel()
    torch.save(state, tmp_path / "base.pt", **options)
    merge_and_check(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
    load_adapter(net := Net(), plain_adapter)
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), merged_state_dict(net))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch 2.15
def test_merge_of_a_file_that_is_no_base_is_refused(tmp_path, plain_adapter: Path):
    torch.save({"state_dict": 3}, tmp_path / "base.pt")
    with pytest.raises(LoRAError, match="expected a state dict, found int"):
        merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
    torch.save(state_with(more=torch.eye(3).to_sparse()), tmp_path / "base.pt")
    with pytest.raises(LoRAError, match="'more' is sparse"):
        merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
    (tmp_path / "base.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(LoRAError, match="cannot be read as a checkpoint"):
        merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
    torch.save(state_with(), tmp_path / "base.pt")
    for name in ("out.safetensors", "out.ckpt", "out"):
        with pytest.raises(LoRAError, match=rf"'{name}' must end in '\.pt'"):
            merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / name)
    assert "out.pt" not in os.listdir(tmp_path)


def test_a_base_that_holds_an_adapter_is_refused(tmp_path, plain_adapter: Path):
    net = Net()
    inject(net, LoRAConfig(r=2, target_modules=TARGETS))
    torch.save(net.state_dict(), tmp_path / "base.pt")
    with pytest.raises(LoRAError, match="the base holds an adapter itself"):
        merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
