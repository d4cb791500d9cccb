"""Lightning's FSDPStrategy (FSDP1) on a CPU: what it demands of CUDA is left out, all else is its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from support.ranks.sharded import make_trainer


class OnCPU(FSDPStrategy):
    """FSDPStrategy: Lightning refuses exactly this class on a CPU, and torch wants to be told the device there."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        with on_cpu():
            return super()._setup_model(model)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with on_cpu(), super().model_sharded_context():
            yield


@contextmanager
def on_cpu() -> Iterator[None]:
    init = FullyShardedDataParallel.__init__

    def on_device(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"device_id": torch.device("cpu")})

    with mock.patch.object(FullyShardedDataParallel, "__init__", on_device):
        yield


def fsdp1(path: Path, *callbacks: L.Callback, options: Any = None, **trainer: Any) -> L.Trainer:
    """A Trainer on all ranks of this world, with FSDP1."""
    torch.cpu.Stream.synchronize = lambda self: None  # type: ignore[attr-defined]  # which torch forgot
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]  # of offloaded slices
    return make_trainer(path, *callbacks, devices=dist.get_world_size(), strategy=OnCPU(**options or {}), **trainer)


def gathered_by_fsdp1(trainer: Any) -> dict[str, torch.Tensor]:
    """The state of a Trainer's model, gathered by torch alone."""
    root = trainer.model
    whole = root.sharding_strategy is ShardingStrategy.NO_SHARD
    with nullcontext() if whole else FullyShardedDataParallel.summon_full_params(root, writeback=False):
        named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}
