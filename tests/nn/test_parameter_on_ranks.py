"""Single parameters that are adapted, on two ranks: DDP and FSDP2 train as one process does, and merge on shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, inject, merge, merged, merged_state_dict, unmerge
from lightning_lora.nn.adapted_weights import adapted_layers
from support.layers import same_bits
from support.parameters import CASES, Model
from support.processes import world
from support.sharded import whole_state

NAMES = ["lstm", "gru", "experts", "transposed experts", "matrix"]
STEPS = 3


def adapted(name: str) -> Model:
    torch.manual_seed(0)
    model = Model(CASES[name].build())
    options: dict[str, Any] = {"r": 2, "target_modules": [], "init_lora_weights": False}
    inject(model, LoRAConfig(target_parameters=CASES[name].targets, **options), seed=1)
    return model


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        x = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def compare(name: str, strategy: str) -> None:
    rank = dist.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    alone, model = adapted(name), adapted(name)
    base = {key: value.clone() for key, value in alone.state_dict().items() if "lora_" not in key}
    if strategy == "DDP":
        train(DistributedDataParallel(model), rows)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rows)
    train(alone, slice(0, 4))
    state = whole_state(model)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
    assert any((value - adapted(name).state_dict()[key]).norm() > 1e-3 for key, value in state.items())
    plain = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in merged_state_dict(model).items()}
    x = torch.randn(2, 4, 5)
    dist.broadcast(x, 0)
    unmerged = model(x).detach()
    for _ in range(3):
        merge(model)
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
        assert all(same_bits(whole_state(model)[key], value) for key, value in base.items())
        unmerge(model)
    assert all(same_bits(whole_state(model)[key], value) for key, value in base.items())
    for key, value in merged_state_dict(alone).items():
        torch.testing.assert_close(plain[key], value, rtol=1e-4, atol=1e-5)
    with merged(model):
        assert all(layer.lora.undo for layer in adapted_layers(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_ranks_train_and_merge_as_one_process_does(name: str, strategy: str):
    world().run(compare, name, strategy)
