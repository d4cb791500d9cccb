"""Variants on two ranks: DDP and FSDP2 train, merge, restore and save as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import (
    LoRAConfig,
    Variant,
    adapter_state_dict,
    inject,
    load_adapter,
    merged,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.nn.variant import variant_of
from support.processes import world
from support.sharded import base_of, whole, whole_state
from support.sharded_adapters import assert_same_bits

STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {"loha": {"lora_alpha": 3}, "own-across": {"lora_alpha": 3}}
WAYS = ("DDP", "FSDP2", "FSDP2, layers in one group", "FSDP2, layer by layer")


class Own(Variant):
    """W' = W + s * B @ R @ A with frozen A and B; PEFT does not have it."""

    name, trained, frozen = "own-across", ("lora_across_R",), ("lora_across_A", "lora_across_B")

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.leaves, ((info.rank, info.rank), *info.factor_shapes()), strict=True))

    def start(self, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(info.seed)
        return {leaf: torch.randn(shape, generator=draw) for leaf, shape in self.shapes(info).items()}

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        square, a, b = (stored[leaf] for leaf in self.leaves)
        return square @ a, b, None


def config_of(variant: str) -> LoRAConfig:
    return LoRAConfig(r=2, variant=variant, **OPTIONS[variant])


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 7))


def adapted(variant: str) -> nn.Sequential:
    model = plain()
    inject(model, config_of(variant), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def compare(way: str, variant: str, path: Path) -> None:
    rank, alone, model = dist.get_rank(), adapted(variant), adapted(variant)
    base, frozen = base_of(alone.state_dict()), {n for n, p in alone.named_parameters() if not p.requires_grad}
    runs: nn.Module = model
    if way == "DDP":
        runs = DistributedDataParallel(model)
        assert not list(model.buffers()), "which DDP would send at every step"
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if way == WAYS[2]:
            fully_shard([model[0], model[2]], mesh=mesh)
        for layer in (model[0], model[2]) if way == WAYS[3] else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    train(runs, slice(2 * rank, 2 * rank + 2))
    train(alone, slice(0, 4))
    state = whole_state(model)
    assert_same_bits(base_of(state), base)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    assert_same_bits(*({n: v for n, v in each.items() if n in frozen} for each in (state, alone.state_dict())))
    x = torch.ones(2, 8)
    unmerged = model(x).detach()
    with merged(model):
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
    assert_same_bits(base_of(whole_state(model)), base)
    expected, found = merged_state_dict(alone), whole(merged_state_dict(model))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    again, in_peft = plain(), bool(variant_of(config_of(variant)).peft_type)
    if in_peft:
        save_adapter(model, path)
    else:
        inject(again, config_of(variant), seed=1)
        again.load_state_dict(whole(adapter_state_dict(model)), strict=False)
    if rank == 0:
        if in_peft:
            load_adapter(again, path)
        torch.testing.assert_close(again(x), unmerged, rtol=1e-4, atol=1e-5)
        held = adapter_state_dict(again)
        assert all(torch.equal(held[name], value) for name, value in state.items() if "lora_" in name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_merge_and_save_as_one_process_does(tmp_path: Path, way: str, variant: str):
    world().run(compare, way, variant, tmp_path)
