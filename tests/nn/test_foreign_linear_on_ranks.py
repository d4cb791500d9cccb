"""Linear layers of other libraries on two processes, under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import LoRACallback, adapter_state_dict
from support.covering import covering
from support.models.foreign import FOREIGN, INPUTS, network
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import make_trainer, model_parallel


class Net(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = network(kind)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Sharded(Net):
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def data(size: int, rank: int) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(4)
    rows = TensorDataset(torch.randn(12, INPUTS, generator=draw), torch.randint(3, (12,), generator=draw))
    sampler: DistributedSampler[Any] = DistributedSampler(rows, size, rank, shuffle=False)
    return DataLoader(rows, batch_size=4 // size, sampler=sampler)


def fit(path: Path, kind: str, sharded: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the checkpoint holds, and the base's tensors that are not sharded after the fit."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(rank)
    callback = LoRACallback(r=2, lora_alpha=4, seed=1, target_modules=["0", "2"])
    model: Net = Sharded(kind) if sharded else Net(kind)
    if sharded and size > 1:
        trainer = model_parallel(path, callback, max_epochs=2)
    else:
        strategy: Any = DDPStrategy(process_group_backend=BACKEND) if size > 1 else "auto"
        trainer = make_trainer(path, callback, devices=size, strategy=strategy, max_epochs=2)
    trainer.fit(model, data(size, rank), data(size, rank))
    trainer.save_checkpoint(path / "last.ckpt")
    saved = torch.load(path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if "lora_" in name} == {n for n in adapter_state_dict(model) if "lora_" in n}
    return saved, {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharded"), covering([*FOREIGN], [True, False], meet=1))
def test_ranks_train_as_one_process_does(tmp_path: Path, kind: str, sharded: bool) -> None:
    alone, _ = fit(tmp_path / "alone", kind, sharded=False)
    for saved, buffers in world().run(fit, tmp_path / "both", kind, sharded):
        factors = {name: value for name, value in saved.items() if "lora_" in name}
        assert saved.keys() == alone.keys()
        assert len(factors) == 4
        for name, value in factors.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-2, atol=1e-3)
        for name, value in Net(kind).named_buffers():
            assert torch.equal(buffers[name], value)
