"""LightningModules that shard themselves, their data, Trainers inside a world, and what a sharded model holds whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from world import BACKEND

FEATURES, HIDDEN, CLASSES, BATCH, BATCHES = 6, 7, 3, 4, 3  # 7 and 3 rows are uneven shards
TARGETS = ["0", "2", "4"]


def network(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
        )


class Plain(L.LightningModule):
    """The same network on one device."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class Sharded(Plain):
    """FSDP2: layer by layer, or the root alone."""

    root_only = False
    options: dict[str, Any] = {}  # noqa: RUF012

    def configure_model(self) -> None:  # once per stage
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in [] if self.root_only else self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh, **self.options)
        fully_shard(self, mesh=mesh, **self.options)


class RootSharded(Sharded):
    root_only = True


def dataset(seed: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    count = BATCH * BATCHES
    return TensorDataset(
        torch.randn(count, FEATURES, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
    )


def loader(world: int = 1, rank: int = 0, seed: int = 5) -> DataLoader[Any]:
    """Every rank takes its part of the same global batches."""
    data = dataset(seed)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world, rank, shuffle=False)
    return DataLoader(data, batch_size=BATCH // world, sampler=sampler)


def make_trainer(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer that writes below `path` and prints nothing."""
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False, "devices": 1} | options
    return L.Trainer(
        accelerator="cpu" if BACKEND == "gloo" else "cuda",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        **options,
    )


def model_parallel(
    path: Path, *callbacks: L.Callback, whole: bool = False, tensor: int = 1, **options: Any
) -> L.Trainer:
    """A Trainer on all ranks of this world; `whole`: checkpoints are single files."""
    size = torch.distributed.get_world_size()
    strategy = ModelParallelStrategy(size // tensor, tensor, save_distributed_checkpoint=not whole)
    return make_trainer(path, *callbacks, devices=size, strategy=strategy, **options)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict gathered with torch alone."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def base_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "lora_" not in name}
