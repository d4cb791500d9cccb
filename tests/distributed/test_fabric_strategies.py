"""Fabric on several processes, with DDP and FSDP2: functions take its modules, its files resume to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    take_adapter,
)
from support.processes import world
from support.sharded import FEATURES, TARGETS, loader, network, whole
from support.sharded_adapters import assert_same_bits

CONFIG = LoRAConfig(r=2, target_modules=TARGETS)
STRATEGIES = ["ddp", "fsdp2"]
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
X = torch.linspace(-1, 1, 4 * FEATURES).view(4, FEATURES)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def start(strategy: str, *, distributed: bool = False) -> tuple[Fabric, nn.Module, Any]:
    """Fabric on all ranks of this world, the adapted network and its optimizer."""
    size = dist.get_world_size()
    fsdp2 = ModelParallelStrategy(shard, size, 1, save_distributed_checkpoint=distributed)
    fabric = Fabric(accelerator="cpu", devices=size, strategy=fsdp2 if strategy == "fsdp2" else strategy)
    fabric.launch()
    torch.manual_seed(0)
    model = network()
    inject(model, CONFIG)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    return fabric, model, fabric.setup_optimizers(optimizer)


def train(fabric: Fabric, model: nn.Module, optimizer: Any, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader(fabric.world_size, fabric.global_rank):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()


def alone(epochs: int) -> nn.Module:
    """The same training in this one process, without Fabric."""
    torch.manual_seed(0)
    model = network()
    inject(model, CONFIG)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(epochs):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def functions(path: Path, strategy: str) -> dict[str, Any]:
    fabric, model, optimizer = start(strategy)
    base = model(X).detach()
    train(fabric, model, optimizer, 2)
    found: dict[str, Any] = {"factored": model(X).detach()}
    with merged(model), torch.no_grad():
        assert is_merged(model)
        found["merged"] = model(X)
    with disable_adapter(model), torch.no_grad():
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), found["factored"])
    save_adapter(model, path / "adapter")
    save_merged(model, path / "merged")
    found["summary"] = str(summary(model)).splitlines()[0]  # what follows is the memory of each rank
    found["state"] = whole(adapter_state_dict(model))
    found["merged state"] = whole(merged_state_dict(model))
    found["taken"] = take_adapter(model).tensors
    load_adapter(model, path / "adapter")
    assert torch.equal(model(X), found["factored"])
    return found


@strategies
def test_functions_take_fabrics_modules_and_train_as_one_process(tmp_path, strategy):
    expected = alone(2)
    for found in world().run(functions, tmp_path, strategy):
        torch.testing.assert_close(found["factored"], expected(X).detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found["merged"], found["factored"], atol=1e-6, rtol=1e-5)
        assert found["summary"] == str(summary(expected)).splitlines()[0]
        assert found["state"].keys() == found["taken"].keys() == adapter_state_dict(expected).keys()
        assert_same_bits(dict(found["taken"]), found["state"])
        assert found["merged state"].keys() == network().state_dict().keys()
    load_adapter(again := network(), tmp_path / "adapter")
    torch.testing.assert_close(again(X), found["factored"])
    (plain := network()).load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(plain(X), found["merged"], atol=1e-6, rtol=1e-5)


def save_and_resume(path: Path, strategy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    fabric, model, optimizer = start(strategy)
    train(fabric, model, optimizer, 1)
    names = set(adapter_state_dict(model))
    state = {"model": model, "optimizer": optimizer, "epoch": 1}
    fabric.save(path / "1.ckpt", state, filter={"model": lambda name, _: name in names})
    train(fabric, model, optimizer, 2)
    uninterrupted = whole(adapter_state_dict(model))
    fabric, model, optimizer = start(strategy)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    fabric.load(path / "1.ckpt", state, strict=False)
    assert state["epoch"] == 1
    train(fabric, model, optimizer, 2)
    return whole(adapter_state_dict(model)), uninterrupted


@strategies
def test_resuming_from_a_filtered_file_equals_the_uninterrupted_run(tmp_path, strategy):
    for resumed, uninterrupted in world().run(save_and_resume, tmp_path, strategy):
        assert_same_bits(resumed, uninterrupted)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["model"]
    assert saved.keys() == adapter_state_dict(alone(0)).keys()
    inject(model := network(), CONFIG)
    load_adapter(model, tmp_path / "1.ckpt")  # in one process
    assert_same_bits(dict(adapter_state_dict(model)), saved)


def save_whole(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    fabric, model, optimizer = start("fsdp2", distributed=True)
    train(fabric, model, optimizer, 1)
    fabric.save(path / "folder", {"model": model, "optimizer": optimizer, "epoch": 1})
    saved = whole(adapter_state_dict(model))
    train(fabric, model, optimizer, 1)
    uninterrupted = whole(adapter_state_dict(model))
    fabric, model, optimizer = start("fsdp2", distributed=True)
    fabric.load(path / "folder", {"model": model, "optimizer": optimizer, "epoch": 0})
    train(fabric, model, optimizer, 1)
    assert_same_bits(whole(adapter_state_dict(model)), uninterrupted)
    return saved, uninterrupted


def test_folder_of_fabric_resumes_and_is_read_in_one_process(tmp_path):
    saved, _ = world().run(save_whole, tmp_path)[0]
    inject(model := network(), CONFIG)
    load_adapter(model, tmp_path / "folder")
    assert_same_bits(dict(adapter_state_dict(model)), saved)
