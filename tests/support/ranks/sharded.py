"""LightningModules that shard themselves, their data, Trainers inside a world, and gathered state of sharded models.

Nothing here uses this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from support.ranks.processes import BACKEND

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
    """The network under FSDP2: sharded layer by layer, or only at the root."""

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
    """A loader that gives each rank its part of the same global batches."""
    data = dataset(seed)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world, rank, shuffle=False)
    return DataLoader(data, batch_size=BATCH // world, sampler=sampler)


def data() -> tuple[Any, Any]:
    size, rank = dist.get_world_size(), dist.get_rank()
    return loader(size, rank), loader(size, rank, 6)


def make_trainer(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer that writes below `path` and prints nothing."""
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False, "devices": 1} | options
    return L.Trainer(
        accelerator="cpu" if BACKEND == "gloo" else "cuda",
        logger=options.pop("logger", False),
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
    """A Trainer on all ranks of this world. With `whole` Lightning's own checkpoints are single files."""
    size = torch.distributed.get_world_size()
    strategy = ModelParallelStrategy(size // tensor, tensor, save_distributed_checkpoint=not whole)
    return make_trainer(path, *callbacks, devices=size, strategy=strategy, **options)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict, gathered by torch alone."""
    return whole(model.state_dict())


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors by name on the CPU, gathered by torch alone."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone().cpu()
        for name, value in tensors.items()
    }


def optimizer_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer, gathered."""
    states = trainer.optimizers[0].state_dict()["state"]
    tensors = {f"{i}/{key}": value for i, state in states.items() for key, value in state.items()}
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in tensors.items()}


def base_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "lora_" not in name}


# --- fully_shard without a Trainer ---

DEVICE = "cpu" if BACKEND == "gloo" else "cuda"

X = torch.linspace(-1, 1, 24).view(4, 6)


def shard_(net: nn.Sequential, *, root_only: bool = False, shape: Any = None, **options: Any) -> nn.Sequential:
    """Call fully_shard on each layer that has parameters, then on the model."""
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in [] if root_only else net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


WAYS: dict[str, dict[str, Any]] = {
    "layers": {},
    "root only": {"root_only": True},
    "not resharded": {"reshard_after_forward": False},
    "resharded": {"reshard_after_forward": True},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "bfloat16 base": {},
    "by columns": {"shard_placement_fn": lambda p: Shard(1) if p.shape == (3, 6) else None},
}
