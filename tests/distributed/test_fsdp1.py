"""FSDPStrategy (FSDP1): as one device, on any number of ranks, in every door."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_lora import (
    LoRACallback,
    LoRAError,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    lora_param_groups,
    save_adapter,
    save_merged,
)
from lightning_lora.command.info import info
from support.fsdp1 import fsdp1
from support.processes import world
from support.sharded import TARGETS, Plain, base_of, data, loader, make_trainer
from support.sharded_adapters import assert_same_bits

slow = pytest.mark.slow

State = dict[str, torch.Tensor]
LAYERS = {"auto_wrap_policy": {nn.Linear}}  # a unit for each layer; otherwise one for the whole model


class Plus(Plain):
    """LoRA+, with groups of their own learning rates, and a decay."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(lora_param_groups(self, lr=0.02, lr_ratio=4, weight_decay=0.1))


class Scheduled(Plain):
    """Another optimizer and a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Unfreezing(Plain):
    """Trains two layers whole from the second epoch on, which FSDP1 has wrapped by then."""

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == 1:
            warnings.filterwarnings("ignore", "lightning_lora: base parameters were unfrozen")
            self.net[0].weight.requires_grad_()
            self.net[4].bias.requires_grad_()


MODELS = {cls.__name__: cls for cls in (Plain, Plus, Scheduled, Unfreezing)}


@dataclass
class Case:
    strategy: dict[str, Any] = field(default_factory=dict)
    model: str = "Plain"
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> tuple[Any, LoRACallback]:
        torch.manual_seed(seed)
        return MODELS[self.model](), LoRACallback(**{"r": 2, "target_modules": TARGETS} | self.lora)


@dataclass
class Run:
    """What a fit gave."""

    state: State
    losses: list[float]
    path: Path


def gathered(root: nn.Module) -> State:
    """The state of a model, gathered by torch alone."""
    whole = root.sharding_strategy is ShardingStrategy.NO_SHARD
    with contextlib.nullcontext() if whole else FullyShardedDataParallel.summon_full_params(root, writeback=False):
        named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}


def on_ranks(case: Case, path: Path, epochs: int, source: Path | None = None, seed: int = 0) -> Run:
    model, callback = case.build(seed)
    warnings.filterwarnings("ignore", "lightning_lora: the components of net.0")
    trainer = fsdp1(path, callback, options=case.strategy, max_epochs=epochs, **case.trainer)
    trainer.fit(model, *data(), ckpt_path=source)
    assert not is_merged(model)
    trainer.save_checkpoint(path / "all.ckpt")
    trainer.save_checkpoint(path / "weights.ckpt", weights_only=True)
    return Run(gathered(trainer.model), list(model.losses), path / "all.ckpt")


def alone(case: Case, path: Path, epochs: int, source: Path | None = None, seed: int = 0) -> Run:
    model, callback = case.build(seed)
    warnings.filterwarnings("ignore", "lightning_lora: the components of net.0")
    trainer = make_trainer(path, callback, max_epochs=epochs, **case.trainer)
    trainer.fit(model, loader(), loader(seed=6), ckpt_path=source)
    trainer.save_checkpoint(path / "all.ckpt")
    return Run({n: value.detach().clone() for n, value in model.state_dict().items()}, model.losses, path / "all.ckpt")


def assert_close(found: Run, expected: Run, epochs: int) -> None:
    """The last epochs, merged in validation, and all values at the end."""
    assert found.losses == pytest.approx(expected.losses[-epochs:], abs=1e-6)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        torch.testing.assert_close(found.state[name], value, atol=2e-6, rtol=0)


CASES = {
    "one unit": Case(),
    "a unit for each layer": Case(LAYERS),
    "SHARD_GRAD_OP": Case({"sharding_strategy": "SHARD_GRAD_OP"}),
    "SHARD_GRAD_OP, layers": Case({"sharding_strategy": "SHARD_GRAD_OP"} | LAYERS),
    "NO_SHARD": Case({"sharding_strategy": "NO_SHARD"}),
    "CPU offload": Case({"cpu_offload": True} | LAYERS),
    "folder of shards": Case({"state_dict_type": "sharded"}),
    "LoRA+": Case(model="Plus"),
    "SGD, a scheduler": Case(model="Scheduled"),
    "weights unfrozen later": Case(LAYERS, model="Unfreezing"),
    "weights unfrozen later, folder": Case({"state_dict_type": "sharded"}, model="Unfreezing"),
    "modules_to_save": Case(lora={"target_modules": ["0", "2"], "modules_to_save": ["4"]}),
    "bias": Case(lora={"bias": "all"}),
    "rank pattern": Case(lora={"rank_pattern": {"2": 3}}),
    "DoRA": Case(lora={"use_dora": True}),
    "PiSSA": Case(LAYERS, lora={"init_lora_weights": "pissa"}),
    "EVA": Case(LAYERS, lora={"init_lora_weights": "eva"}),
    "VeRA": Case(LAYERS, lora={"variant": "vera"}),
    "LoHa": Case(lora={"variant": "loha", "r": 1}),
    "verified": Case(lora={"verify": True}),
    "gradient clipping": Case(trainer={"gradient_clip_val": 0.1}),
    "unfrozen, clipped": Case(model="Unfreezing", trainer={"gradient_clip_val": 0.1}),
    "accumulated gradients": Case(trainer={"accumulate_grad_batches": 2}),
}


@slow
@pytest.mark.parametrize("name", CASES)
def test_run_equals_one_device_and_is_resumed_exactly_by_ranks_and_by_one_device(tmp_path, name):
    case = CASES[name]
    expected, base = alone(case, tmp_path / "alone", 3), case.build(0)[0].state_dict()
    whole = world().run(on_ranks, case, tmp_path / "whole", 3)
    for found in whole:
        assert_close(found, expected, 3)
        if case.model != "Unfreezing":
            frozen = [n for n in base if torch.equal(expected.state[n], base[n])]
            assert len(frozen) >= 3
            assert_same_bits(*({n: state[n] for n in frozen} for state in (found.state, base)))
    first = world().run(on_ranks, case, tmp_path / "first", 2)[0].path
    for found in world().run(on_ranks, case, tmp_path / "second", 3, first, 5):
        assert_same_bits(found.state, whole[0].state)
        assert found.losses == whole[0].losses[2:]
    assert_close(alone(case, tmp_path / "one", 3, first, 5), expected, 1)
