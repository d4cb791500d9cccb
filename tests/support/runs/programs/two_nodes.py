"""A fit of four processes, which torchrun's launcher starts on two nodes of two; one process is killed once.

python -m support.runs.programs.two_nodes FOLDER KIND PORT: one node.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from support.ranks.processes import BACKEND
from support.ranks.sharded import BATCHES, DEVICE, Plain, data, make_trainer, optimizer_state, whole_state
from support.ranks.sharded_adapters import lora

EPOCHS, DIES_IN, DYING_RANK = 4, 2, 3


class Net(Plain):
    note: Path | None = None  # there once the process was killed

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        due = self.global_step == DIES_IN * BATCHES + 1 and self.global_rank == DYING_RANK
        if due and self.note and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class HybridSharded(Net):
    """Sharded over the two processes of a node, and replicated over the nodes."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Loaders:
    """The loaders need the process group, which the Trainer makes."""

    def train_dataloader(self) -> Any:
        return data()[0]

    def val_dataloader(self) -> Any:
        return data()[1]


class DDPNet(Loaders, Net):
    pass


class HSDPNet(Loaders, HybridSharded):
    pass


def fit(folder: Path, kind: str, nodes: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Train on all ranks, with a kill if these are several nodes. Return weights and optimizer's states, gathered."""
    torch.manual_seed(0)
    strategy = (
        DDPStrategy(process_group_backend=BACKEND, find_unused_parameters=True)  # DDP then keeps the order of its sums
        if kind == "ddp"
        else ModelParallelStrategy(4, 1, save_distributed_checkpoint=False)
    )
    trainer = make_trainer(
        folder,
        lora(),
        ModelCheckpoint(folder, save_last=True),
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        strategy=strategy,
        devices=4 // nodes,
        num_nodes=nodes,
    )
    model = DDPNet() if kind == "ddp" else HSDPNet()
    model.note = folder / "killed" if nodes > 1 else None
    trainer.fit(model, ckpt_path="last" if nodes > 1 else None)
    return whole_state(model), optimizer_state(trainer)


def rank(folder: Path, kind: str) -> None:
    found = fit(folder, kind, nodes=2)
    if os.environ["RANK"] == "0":
        torch.save((*found, os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]), folder / "found.pt")


def node(folder: Path, kind: str, port: str) -> None:
    """Do what torchrun does, but with forks of this process, which has imported all that eight ranks would import."""
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=2,
        max_restarts=3,
        run_id="two-nodes",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"keep_alive_max_attempt": 20, "heartbeat_timeout": 60},  # a busy machine is no dead node
        local_addr="127.0.0.1",
        start_method="fork",
    )
    elastic_launch(config, rank)(folder, kind)


if __name__ == "__main__":
    node(Path(sys.argv[1]), *sys.argv[2:])
