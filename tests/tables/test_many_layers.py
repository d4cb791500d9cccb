"""Every cost is linear in the number of layers. Calls are counted: unlike times, counts are exact."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    summary,
    unload,
    unmerge,
)
from lightning_lora.command.info import diff, info
from support.files.expected_weights import merge_and_check
from support.models.networks import checkpoint
from support.runs.shortcuts import without_collections
from support.runs.training import make_trainer

FEW, MORE, MANY = 4, 8, 16
MOST = 2.02  # MANY - MORE is twice as much as MORE - FEW; what grows with the square shows, and what is constant not


def calls(work: Callable[[], Any]) -> int:
    """How many functions are entered, Python's and built-in ones."""
    profile = cProfile.Profile()
    with without_collections():  # which call what is told of freed objects
        profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.norm = nn.Linear(4, 4), nn.Linear(4, 6), nn.LayerNorm(6)


def network(count: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(count))})


class Trained(L.LightningModule):
    """Trains a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        result: torch.Tensor = sum(block.wide(block.square(batch)).sum() for block in self.net.blocks)
        return result

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(count: int, path: Path) -> Callable[[], Any]:
    model, trainer = Trained(network(count)), make_trainer(path, LoRACallback(r=2), max_steps=1)
    return lambda: trainer.fit(model, DataLoader(torch.ones(1, 4)))


def options(count: int, form: str) -> LoRAConfig:
    """The layers by a suffix, or each by its whole name, and beside the adapter what is trained in each block."""
    names = (
        ["square", "wide"]
        if form == "suffixes"
        else [f"blocks.{i}.{n}" for i in range(count) for n in ("square", "wide")]
    )
    saved = ["norm"] if form == "suffixes" else [f"blocks.{i}.norm" for i in range(count)]
    return LoRAConfig(r=2, target_modules=names, modules_to_save=saved, exclude_modules=[names[-1]], bias="all")


def steps(count: int, form: str, path: Path) -> dict[str, Callable[[], Any]]:
    """What is done with a model, in order."""
    net, bare, other, third, inner = (network(count) for _ in range(5))
    save_file(net.state_dict(), path / "base.safetensors")
    torch.save(net.state_dict(), path / "base.pt")
    peft = path / "peft"
    return {
        "inject": lambda: inject(net, options(count, form)),
        "summary": lambda: str(summary(net)),
        "adapter_state_dict": lambda: adapter_state_dict(net),
        "merge": lambda: merge(net),
        "unmerge": lambda: unmerge(net),
        "merged_state_dict": lambda: merged_state_dict(net),
        "checkpoint": lambda: torch.save(checkpoint(net, "adapter"), path / "written.ckpt"),
        "save_adapter": lambda: save_adapter(net, path / "folder"),
        "load_adapter": lambda: load_adapter(bare, path / "folder"),
        "again": lambda: load_adapter(net, path / "folder"),
        "from a checkpoint": lambda: load_adapter(other, path / "written.ckpt"),
        "under a prefix": lambda: load_adapter(nn.ModuleDict({"network": inner}), path / "folder"),
        "PEFT's folder": lambda: load_adapter(third, without_our_header(path / "folder", peft)),
        "merge a file": lambda: merge_and_check(path / "base.safetensors", peft, path / "o.safetensors"),
        "merge a checkpoint": lambda: merge_and_check(path / "base.pt", path / "folder", path / "out.pt"),
        "info": lambda: info(path / "folder"),
        "diff": lambda: diff(path / "folder", path / "written.ckpt"),
        "unload": lambda: unload(bare),
        "merge_and_unload": lambda: merge_and_unload(other),
        "fit": fit(count, path),
    }


def without_our_header(folder: Path, target: Path) -> Path:
    """The folder as if PEFT had written it."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(load_file(folder / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("form", ["suffixes", "whole names"])
def test_every_cost_grows_no_faster_than_the_number_of_layers(tmp_path, form: str):
    counts = []
    for count in (2, FEW, MORE, MANY):  # the first time, modules are imported
        path = tmp_path / str(count)
        path.mkdir()
        counts.append({name: calls(step) for name, step in steps(count, form, path).items()})
    _, few, more, many = counts
    grown = {name: (many[name] - more[name]) / (more[name] - few[name]) for name in few}
    print({name: round(ratio, 2) for name, ratio in grown.items()})
    assert {name: ratio for name, ratio in grown.items() if ratio > MOST} == {}
    assert min(grown.values()) > 1.5
