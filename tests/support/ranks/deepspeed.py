"""Lightning's DeepSpeedStrategy on a CPU: what it demands of CUDA is left out, all else is its own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy

from support.ranks.sharded import make_trainer

# What DeepSpeed's use of torch is warned of.
NOTICES = ("`torch.distributed.[a-z_]+` is deprecated", "`torch.jit.script_method` is deprecated")

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported


class OnCPU(DeepSpeedStrategy):
    """DeepSpeedStrategy, whose setup_environment refuses every accelerator but CUDA."""

    def setup_environment(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes minutes
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        self._init_config_if_needed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # deepspeed.initialize wants an index


def zero(path: Path, *callbacks: L.Callback, stage: int, options: Any = None, **trainer: Any) -> L.Trainer:
    """A Trainer on all ranks of this world, with DeepSpeed's ZeRO of this stage."""
    for message in NOTICES:
        warnings.filterwarnings("ignore", message)
    strategy = OnCPU(stage=stage, **{"logging_level": 30} | (options or {}))
    return make_trainer(path, *callbacks, devices=dist.get_world_size(), strategy=strategy, **trainer)


def gathered_by_deepspeed(trainer: Any) -> dict[str, torch.Tensor]:
    """The state of a Trainer's model, gathered by DeepSpeed where each rank has a slice."""
    import deepspeed

    model = trainer.lightning_module
    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
