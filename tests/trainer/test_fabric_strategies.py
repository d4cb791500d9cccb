"""Fabric with FSDP1 and DeepSpeed, which divide the adapter and tell nobody how: refused by name."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    take_adapter,
    unload,
    unmerge,
)
from support.ranks.deepspeed import NOTICES
from support.ranks.fsdp1 import on_cpu
from support.ranks.processes import world
from support.ranks.sharded import FEATURES, TARGETS, loader, network
from support.ranks.strategies import import_package

CONFIG = LoRAConfig(r=2, target_modules=TARGETS)
X = torch.linspace(-1, 1, 4 * FEATURES).view(4, FEATURES)


def train(fabric: Fabric, model: nn.Module, optimizer: Any, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader(fabric.world_size, fabric.global_rank):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()


def alone(epochs: int) -> nn.Module:
    """The same training in this one process, without Fabric."""
    torch.manual_seed(0)
    model = network()
    inject(model, CONFIG)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(epochs):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


class FSDP1OnCPU(FSDPStrategy):
    def setup_module(self, module: nn.Module) -> nn.Module:
        with on_cpu():
            return super().setup_module(module)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    def setup_environment(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes minutes
        self._set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def started_on_cpu(strategy: Any) -> tuple[Fabric, nn.Module, Any]:
    for message in (
        *NOTICES,
        "Please use DTensor",
        "`_get_pg_default_device`",
        "Multiple backends are registered",
        "FSDP.state_dict_type",
    ):
        warnings.filterwarnings("ignore", message)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    inject(model := network(), CONFIG)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    return fabric, *fabric.setup(model, optimizer)


def said_by_functions(path: Path, model: nn.Module) -> list[str]:
    doors = (merge, unmerge, unload, adapter_state_dict, merged_state_dict, take_adapter, summary)
    said = [refusal(verb, model) for verb in doors]
    return [*said, *(refusal(verb, model, path / "out") for verb in (save_adapter, save_merged, load_adapter))]


def refusal(verb: Any, *args: Any) -> str:
    with pytest.raises(LoRAError, match=f"^{verb.__name__}: ") as refused:
        verb(*args)
    return str(refused.value)


def with_fsdp1(path: Path) -> tuple[list[str], torch.Tensor]:
    fabric, model, optimizer = started_on_cpu(FSDP1OnCPU())
    base = model(X).detach()
    train(fabric, model, optimizer, 2)
    with disable_adapter(model):
        assert torch.equal(model(X), base)
    assert not is_merged(model)
    return said_by_functions(path, model), model(X).detach()


def test_fsdp1_is_refused_by_each_function(tmp_path):
    for said, trained in world().run(with_fsdp1, tmp_path):
        assert all("FSDP1 has divided the adapter, together with the weights" in each for each in said)
        torch.testing.assert_close(trained, alone(2)(X).detach(), atol=1e-6, rtol=1e-5)


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")


def with_deepspeed(path: Path, stage: int) -> tuple[list[str], torch.Tensor, Any]:
    options = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    fabric, model, optimizer = started_on_cpu(DeepSpeedOnCPU(config=options | {"zero_optimization": zero}))
    train(fabric, model, optimizer, 2)
    found = model(X).detach()
    if stage == 3:
        return said_by_functions(path, model), found, None
    with merged(model), torch.no_grad():
        torch.testing.assert_close(model(X), found, atol=1e-6, rtol=1e-5)
    return [refusal(load_adapter, model, path)], found, take_adapter(model)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_refused_where_it_would_be_wrong(tmp_path, stage):
    world().run(import_package, "deepspeed", timeout=240)  # its import takes a while
    for said, trained, adapter in world().run(with_deepspeed, tmp_path, stage):
        torch.testing.assert_close(trained, alone(2)(X).detach(), atol=1e-6, rtol=1e-5)
        expected = "Call load_adapter before fabric.setup" if stage == 2 else "DeepSpeed's stage 3 has divided"
        assert all(expected in each for each in said)
        if adapter:
            load_adapter(model := network(), adapter)
            torch.testing.assert_close(model(X).detach(), trained)
