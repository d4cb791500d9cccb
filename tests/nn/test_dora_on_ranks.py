"""Magnitudes of outputs on two ranks: DDP and FSDP2 train as one process does, merge and load on shards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    merge,
    merged,
    merged_state_dict,
    unmerge,
)
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.nn.output_norms import norms_of_weight
from support.processes import world
from support.sharded import whole_state
from support.sharded_adapters import assert_same_bits

STEPS = 3
WAYS = ["DDP", "FSDP2, a unit for each", "FSDP2, by columns"]


class Net(nn.Module):
    """A layer of each way in which a weight is stored; 7 outputs are uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 7), Conv1D(5, 7)
        self.conv = nn.Conv1d(5, 9, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.tanh(self.up(self.emb(tokens))))
        result: torch.Tensor = self.conv(hidden.transpose(1, 2))
        return result


def adapted() -> Net:
    torch.manual_seed(0)
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=["emb", "up", "down", "conv"], use_dora=True), seed=1)
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(batch(step)[rows]) - 1).square().mean().backward()
        optimizer.step()


def shard_(model: Net, way: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place: Any = (lambda p: Shard(1) if p.shape in ((11, 6), (7, 6)) else None) if way.endswith("columns") else None
    for part in model.children() if way.endswith("each") else ():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def compare(way: str) -> None:
    rank = dist.get_rank()
    alone, model = adapted(), adapted()
    base = {key: value.clone() for key, value in alone.state_dict().items() if "lora_" not in key}
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    if way == "DDP":
        train(DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    else:
        shard_(model, way)
        train(model, slice(2 * rank, 2 * rank + 2))
    train(alone, slice(0, 4))
    state = whole_state(model)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)
        assert ("lora_" in key) == (not torch.equal(value, before[key])), key
    plain = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in merged_state_dict(model).items()}
    unmerged = model(batch(9)).detach()
    for _ in range(3):
        merge(model)
        assert all(layer.lora.undo for layer in adapted_layers(model).values())
        torch.testing.assert_close(model(batch(9)), unmerged, rtol=1e-4, atol=1e-5)
        assert_same_bits({key: value for key, value in whole_state(model).items() if key in base}, base)
        unmerge(model)
    assert_same_bits({key: value for key, value in whole_state(model).items() if key in base}, base)
    torch.testing.assert_close(model(batch(9)), unmerged, rtol=0, atol=0)
    for key, value in merged_state_dict(alone).items():
        torch.testing.assert_close(plain[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_and_merge_as_one_process_does(way: str):
    world().run(compare, way)


def load_new_base(trained: bool) -> None:
    model = adapted()
    if trained:
        train(model, slice(0, 4))
    magnitude = model.down.lora_magnitude.detach().clone()
    shard_(model, "FSDP2")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = {key: value * 2 for key, value in adapted().state_dict().items() if "lora_" not in key}
    with merged(model):
        model.load_state_dict({key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in base.items()})
    state = whole_state(model)
    wanted = magnitude if trained else base["down.weight"].double().norm(dim=0).float()
    torch.testing.assert_close(state["down.lora_magnitude"], wanted, rtol=2e-7 if not trained else 0, atol=0)
    if not trained:
        plain = Net()
        plain.load_state_dict(base)
        torch.testing.assert_close(model(batch(1)), plain(batch(1)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_initial_magnitudes_follow_a_new_base_on_shards(trained: bool):
    world().run(load_new_base, trained)


def norms_of_shards() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype, dim, transposed in itertools.product((torch.float32, torch.bfloat16), (0, 1), (False, True)):
        torch.manual_seed(0)
        a, b = torch.randn(2, 64).to(dtype), torch.randn(7, 2).to(dtype)
        exact, sizes = 0.5 * b.double() @ a.double(), torch.tensor([1.0] * 6 + [1e-3])[:, None]
        weight = (torch.randn(7, 64, dtype=torch.float64) * sizes - exact).to(dtype)
        wanted = (weight.double() + exact).norm(dim=1)
        shards = distribute_tensor(weight.T.contiguous() if transposed else weight, mesh, [Shard(dim)])
        found = norms_of_weight(shards, a, b, 0.5, transposed=transposed)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_norms_of_shards_are_those_of_the_whole_weight():
    world().run(norms_of_shards)


def split() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, style in (("up", ColwiseParallel()), ("emb", RowwiseParallel())):
        with pytest.raises(LoRAError, match="use_dora"):
            parallelize_module(adapted(), mesh, {name: style})


def test_a_tensor_parallel_split_is_refused():
    world().run(split)
