"""Rows of tables that are trained, on two ranks: DDP and FSDP2 train as one process does, merge and load on shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    merge,
    merged,
    merged_state_dict,
    unmerge,
)
from lightning_lora.distributed.sharding import rows_of
from lightning_lora.exchange.take import fingerprint
from lightning_lora.nn.adapted_weights import adapted_layers
from support.layers import same_bits
from support.processes import world
from support.sharded import RootSharded, model_parallel, optimizer_state, whole_state
from support.sharded_adapters import assert_same_bits
from support.tables import NUMBER, ROWS, Net

STEPS = 3
WAYS = ["DDP", "FSDP2", "FSDP2, a unit for each", "FSDP2, by columns"]


def adapted(tied: bool) -> Net:
    torch.manual_seed(0)
    model = Net(tied=tied)
    indices = {"emb": ROWS} if tied else {"emb": ROWS, "head": (0, 38)}
    inject(model, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices=indices), seed=1)
    return model


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.cat([torch.tensor([[*ROWS]] * 4), torch.randint(NUMBER, (4, 3), generator=generator)], 1)


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()


def shard_(model: Net, way: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place: Any = (lambda p: Shard(1) if p.shape[0] == NUMBER else None) if way.endswith("columns") else None
    for part in (model.emb, model.body, model.head) if way.endswith("each") else ():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def compare(way: str, tied: bool) -> None:
    rank = dist.get_rank()
    alone, model = adapted(tied), adapted(tied)
    base = {key: value.clone() for key, value in alone.state_dict().items() if "lora_" not in key}
    entries = fingerprint(alone)
    if way == "DDP":
        train(DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    else:
        shard_(model, way)
        train(model, slice(2 * rank, 2 * rank + 2))
    train(alone, slice(0, 4))
    state = whole_state(model)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
    moved = (state["emb.lora_rows"] - base["emb.weight"][list(ROWS)]).abs().amax(1)
    assert (moved > 1e-4).all()
    assert str(fingerprint(model)) == str(entries)
    plain = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in merged_state_dict(model).items()}
    assert same_bits(plain["emb.weight"][list(ROWS)], state["emb.lora_rows"])
    unmerged = model(batch(9)).detach()
    for _ in range(3):
        merge(model)
        assert all(layer.lora.undo for layer in adapted_layers(model).values())
        torch.testing.assert_close(model(batch(9)), unmerged, rtol=1e-4, atol=1e-5)
        assert all(same_bits(whole_state(model)[key], value) for key, value in base.items())
        unmerge(model)
    assert all(same_bits(whole_state(model)[key], value) for key, value in base.items())
    for key, value in merged_state_dict(alone).items():
        torch.testing.assert_close(plain[key], value, rtol=1e-4, atol=1e-5)


PAIRS = [(way, tied) for way in WAYS for tied in (False, True) if not (tied and "each" in way)]  # torch cannot


@pytest.mark.slow
@pytest.mark.parametrize(("way", "tied"), PAIRS)
def test_two_ranks_train_and_merge_as_one_process_does(way: str, tied: bool):
    world().run(compare, way, tied)


def load_new_base(trained: bool) -> None:
    model = adapted(False)
    if trained:
        train(model, slice(0, 4))
    rows = model.emb.lora_rows.detach().clone()
    shard_(model, "FSDP2")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = {key: value + 1 for key, value in adapted(False).state_dict().items() if "lora_" not in key}
    with merged(model):
        model.load_state_dict({key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in base.items()})
    state = whole_state(model)
    assert all(same_bits(state[key], value) for key, value in base.items())
    assert torch.equal(state["emb.lora_rows"], rows if trained else base["emb.weight"][list(ROWS)])


@pytest.mark.parametrize("trained", [False, True])
def test_rows_that_are_the_bases_follow_a_new_base_on_shards(trained: bool):
    world().run(load_new_base, trained)


def split(name: str) -> None:
    model = adapted(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(LoRAError, match="trained rows do not follow a tensor parallel split"):
        parallelize_module(model, mesh, {name: ColwiseParallel()})


@pytest.mark.parametrize("name", ["emb", "head"])
def test_a_tensor_parallel_split_of_a_table_is_refused(name: str):
    world().run(split, name)


class Tables(RootSharded):
    """A LightningModule around the network, sharded with it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net: Any = Net(tied=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = TensorDataset(torch.cat([batch(step) for step in range(3)]))
    sampler: Any = DistributedSampler(data, dist.get_world_size(), dist.get_rank(), shuffle=False)
    return (DataLoader(data, batch_size=2, sampler=sampler),) * 2


def fit(path: Path, save: Any, epochs: int, source: Path | None = None) -> Any:
    callback = LoRACallback(
        save=save, seed=1, r=2, target_modules=["body"], trainable_token_indices={"emb": ROWS, "head": ROWS}
    )
    trainer = model_parallel(path, callback, max_epochs=epochs)
    trainer.fit(model := Tables(), *loaders(), ckpt_path=source)
    trainer.save_checkpoint(path / "a.ckpt")
    return whole_state(model), optimizer_state(trainer), model.losses


@pytest.mark.slow
@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_a_resumed_sharded_run_equals_the_uninterrupted_one(tmp_path, save: str):
    state, optimizer, losses = world().run(fit, tmp_path, save, 4)[0]
    world().run(fit, tmp_path / "first", save, 2)
    for found in world().run(fit, tmp_path / "second", save, 4, tmp_path / "first" / "a.ckpt"):
        assert_same_bits(found[0], state)
        assert_same_bits(found[1], optimizer)
        assert found[2] == losses[-len(found[2]) :]
    load_adapter(alone := Tables(), tmp_path / "a.ckpt")
    found = dict(alone.state_dict())
    assert_same_bits({name: found[name] for name in state}, state)
    moved = (state["net.emb.lora_rows"] - state["net.emb.weight"][list(ROWS)]).abs().amin()
    assert moved > 1e-6


def gather_rows() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for count in (6, 5):
        table = torch.arange(4.0 * count).view(count, 4) + 1
        rows = [0, 2, 3, count - 1]  # the first and the last of each shard
        for placement in (Shard(0), Shard(1), Replicate()):
            assert torch.equal(rows_of(distribute_tensor(table, mesh, [placement]), rows), table[rows])


def test_rows_at_the_ends_of_shards_are_gathered():
    world().run(gather_rows)
