"""Adapters that start from the weight, on two ranks: DDP, FSDP2 and tensor parallelism train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, LoRAError, inject, merged, merged_state_dict
from support.processes import world
from support.sharded import base_of, whole_state
from support.sharded_adapters import PLAN, TENSOR_X, assert_same_bits, block, mesh

STEPS = 3


def adapted(init: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 7))
    inject(model, LoRAConfig(r=2, lora_alpha=3, init_lora_weights=init), seed=1)
    return model


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def compare(strategy: str, init: str) -> None:
    rank = dist.get_rank()
    alone = adapted(init)
    # Under DDP each rank has a base of its own, as with unseeded weights, until rank 0's is sent to all.
    model = adapted(init, seed=rank if strategy == "DDP" else 0)
    base = base_of(alone.state_dict())
    if strategy == "DDP":
        wrapped = DistributedDataParallel(model)
        assert not list(wrapped.module.buffers()), "which DDP would send at every step"
        train(wrapped, slice(2 * rank, 2 * rank + 2))
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        train(model, slice(2 * rank, 2 * rank + 2))
    train(alone, slice(0, 4))
    state = whole_state(model)
    assert_same_bits(base_of(state), base)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    assert_same_bits(*({n: v for n, v in each.items() if "start" in n} for each in (state, alone.state_dict())))
    x = torch.ones(2, 8)
    unmerged = model(x).detach()
    with merged(model):
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
    assert_same_bits(base_of(whole_state(model)), base)
    expected = merged_state_dict(alone)
    for name, value in merged_state_dict(model).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_ranks_train_and_merge_as_one_process_does(strategy: str, init: str):
    world().run(compare, strategy, init)


def parallel() -> None:
    config = LoRAConfig(r=2, lora_alpha=3, init_lora_weights="pissa")
    net, alone = parallelize_module(block(config), mesh(), PLAN), block(config)
    assert net.up.lora_start_B.placements == net.up.lora_B.placements == net.up.weight.placements
    assert net.down.lora_start_A.placements == net.down.lora_A.placements == net.down.weight.placements
    for model in (net, alone):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(TENSOR_X).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(net(TENSOR_X), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
    with merged(net):
        torch.testing.assert_close(net(TENSOR_X), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
    before, after = (base_of(whole_state(each)) for each in (alone, net))
    assert_same_bits(after, before)


@pytest.mark.slow
def test_a_split_layer_trains_as_on_one_device():
    world().run(parallel)


def sharded_first() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(LoRAError, match="is sharded already; call inject"):
        inject(model, LoRAConfig(r=2, init_lora_weights="pissa"))


def test_a_weight_that_is_sharded_before_is_refused_by_name():
    world().run(sharded_first)
