"""Adapters on sharded and on tensor-parallel models, and comparisons with one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from lightning_lora import LoRACallback, LoRAConfig, inject, lora_param_groups
from support.models.networks import bits, randomise_
from support.ranks.sharded import DEVICE, TARGETS, Plain, network

LINEAR = LoRAConfig(r=3, lora_alpha=6)


def injected(seed: int = 1, config: LoRAConfig = LINEAR, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = network(seed).to(dtype)
    inject(net, config)
    randomise_(net, 0.3)
    return net


def adapters(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in net.named_parameters() if "lora_" in name]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert bits(found[name]) == bits(value), name


def assert_same_run(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 0
        assert_same_bits(one, other)


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(r=2, target_modules=TARGETS, **options)


class Plus(Plain):
    """LoRA+, with groups of their own learning rates, and a decay."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(lora_param_groups(self, lr=0.02, lr_ratio=4, weight_decay=0.1))


class Scheduled(Plain):
    """Another optimizer, with one state for each value, and a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


# --- a block whose layers are split over ranks ---

ALL_LINEAR = LoRAConfig(r=3, lora_alpha=6, target_modules="all-linear")


class Block(nn.Module):
    """The feed-forward block of a transformer: up is split by outputs, down by inputs."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return result


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
UNEVEN = {  # torch wants even local outputs
    "up": ColwiseParallel(use_local_output=False),
    "down": RowwiseParallel(),
}
SEQUENCE = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}


def block(config: LoRAConfig | None = ALL_LINEAR, hidden: int = 8) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Block(hidden)
    if config is not None:
        inject(model, config)
        randomise_(model, 0.3)
    return model


def mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (dist.get_world_size(),), mesh_dim_names=("tp",))


TENSOR_X = torch.linspace(-1, 1, 48).view(2, 4, 6)

PLANS = {"even": PLAN, "uneven": UNEVEN, "sequence": SEQUENCE}
