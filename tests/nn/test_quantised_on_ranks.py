"""Quantised bases on two processes: DDP trains equal adapters; FSDP2 refuses other than 4 bits by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import LoRACallback, LoRAError, merge, save_adapter
from support.processes import BACKEND, world
from support.quantised import NAMES, NF4, OF_TORCHAO, OUTPUTS, QuantisedNet, adapted, factors, inputs, packed_bits
from support.sharded import make_trainer, model_parallel


def data(size: int, rank: int) -> DataLoader[Any]:
    labels = torch.randint(OUTPUTS, (12,), generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(inputs(12, 1), labels)
    sampler: DistributedSampler[Any] = DistributedSampler(rows, size, rank, shuffle=False)
    return DataLoader(rows, batch_size=4 // size, sampler=sampler)


def fit(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], bool]:
    """The trained factors, and whether the base has the bits that it had."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(rank)  # another stream on every rank
    model, untouched = QuantisedNet(kind), QuantisedNet(kind)
    strategy = DDPStrategy(process_group_backend=BACKEND) if size > 1 else "auto"
    trainer = make_trainer(path, LoRACallback(r=2, lora_alpha=4, seed=1), devices=size, strategy=strategy, max_epochs=2)
    trainer.fit(model, data(size, rank), data(size, rank))
    trainer.save_checkpoint(path / "last.ckpt")
    return factors(model), packed_bits(model) == packed_bits(untouched)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8", OF_TORCHAO[0], NF4])
def test_ranks_train_equal_adapters_as_one_process_does(tmp_path, kind):
    alone, _ = fit(tmp_path / "alone", kind)
    first, second = world().run(fit, tmp_path / "both", kind)
    assert first[1]
    assert second[1]
    for name, value in alone.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=1e-3, atol=1e-4)
    saved = torch.load(tmp_path / "both/last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == alone.keys()
    assert all(torch.equal(saved[name], first[0][name]) for name in saved)


class ShardedQuantised(QuantisedNet):
    """Shards itself in configure_model, as a program for FSDP2 does."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def refused(path: Path, kind: str) -> tuple[str, int]:
    model = ShardedQuantised(kind)
    with pytest.raises(LoRAError) as error:
        model_parallel(path, LoRACallback(r=2)).fit(model, data(2, dist.get_rank()), data(2, dist.get_rank()))
    return str(error.value), len(model.seen)


@pytest.mark.parametrize("kind", ["int8", OF_TORCHAO[0]])
def test_sharding_8_bit_weights_is_refused_by_name(tmp_path, kind):
    QuantisedNet(kind)  # skips where its package is missing
    expected = rf"'network\.0' is quantised \({NAMES[kind]}\), which ModelParallelStrategy cannot .*strategy='ddp'"
    for message, steps in world().run(refused, tmp_path, kind):
        assert re.search(expected, message)
        assert steps == 0


def shard_by_hand(path: Path) -> list[str]:
    model = adapted("int8")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    messages = []
    for verb in (lambda: save_adapter(model, path / "adapter"), lambda: merge(model)):
        with pytest.raises(LoRAError) as error:
            verb()
        messages.append(str(error.value))
    return messages


def test_what_needs_the_values_of_sharded_8_bit_weights_is_refused_by_name(tmp_path):
    pytest.importorskip("bitsandbytes")
    for messages in world().run(shard_by_hand, tmp_path):
        assert all("'0': its quantised weight was sharded" in message for message in messages)
