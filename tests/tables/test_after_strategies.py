"""A process that ran fits under strategies is, for a plain model after them, as a fresh one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizer_hooks

from lightning_lora import LoRACallback, merge, merged_state_dict, save_adapter, unmerge
from support.ranks.fsdp1 import fsdp1
from support.ranks.processes import World
from support.ranks.sharded import TARGETS, Plain, Sharded, data, loader, make_trainer, model_parallel
from support.ranks.sharded_adapters import assert_same_bits
from support.ranks.strategies import import_package, stage_2, stage_3

pytestmark = pytest.mark.slow

Start = Callable[..., L.Trainer]
STRATEGIES: dict[str, tuple[type[Plain], Start]] = {"FSDP2": (Sharded, model_parallel), "FSDP1": (Plain, fsdp1)}
if find_spec("deepspeed") is not None:
    STRATEGIES |= {"stage 2": (Plain, stage_2), "stage 3": (Plain, stage_3)}
CLASSES = (
    *(torch.Tensor, nn.Parameter, nn.Module, nn.Linear, torch.optim.Optimizer, torch.optim.AdamW),
    *(FullyShardedDataParallel, L.Trainer, L.LightningModule, L.Callback),
    *(FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy),
)


def ours(value: Any) -> bool:
    return str(getattr(getattr(value, "func", value), "__module__", "")).startswith("lightning_lora")


def state_of_the_package() -> Iterator[tuple[str, Any]]:
    """What modules and classes of the package hold beside functions and classes, as text."""
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] == "lightning_lora":
            classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name]
            for holder in (module, *classes):
                for key, value in vars(holder).items():
                    if not key.startswith("__") and not isinstance(value, (type, FunctionType, ModuleType)):
                        yield f"{name}.{getattr(holder, '__qualname__', '')}.{key}", described(value)


def described(value: Any) -> str:
    """Sizes of containers, and the text of what cannot hold others."""
    if isinstance(value, (str, int, float, bool, tuple, type(None))):
        return repr(value)
    return f"{type(value).__name__} of {len(value)}" if hasattr(type(value), "__len__") else type(value).__name__


def patches() -> Iterator[str]:
    """Hooks of torch for all modules and optimizers, and attributes of classes of others, that are of this package."""
    for holder in (global_hooks, optimizer_hooks):
        for name, hooks in vars(holder).items():
            if name.startswith("_global") and isinstance(hooks, dict):
                yield from (f"{name}: {hook}" for hook in hooks.values())
    for cls in CLASSES:
        yield from (f"{cls.__name__}.{name}" for name, value in vars(cls).items() if ours(value) or "lora" in name)


def used_on_one_device(path: Path) -> dict[str, Any]:
    """Train, merge and save a plain model."""
    torch.manual_seed(0)
    model = Plain()
    trainer = make_trainer(path, LoRACallback(r=2, target_modules=TARGETS), max_epochs=2)
    trainer.fit(model, loader(), loader(seed=6))
    save_adapter(model, path / "adapter")
    found = {f"trained {name}": value.clone() for name, value in model.state_dict().items()}
    merge(model)
    found |= {f"merged {name}": value.detach().clone() for name, value in model.named_parameters()}
    unmerge(model)
    found |= {f"plain {name}": value.clone() for name, value in merged_state_dict(model).items()}
    found["losses"] = torch.tensor(model.losses)
    return found


def used_after_strategies(path: Path) -> dict[str, Any]:
    """What a plain model gives on this rank after fits under all strategies, which leave nothing behind."""
    used_on_one_device(path / f"before {dist.get_rank()}")
    hooks, known = sorted(patches()), dict(state_of_the_package())
    for name, (cls, start) in STRATEGIES.items():
        torch.manual_seed(0)
        trainer = start(path / name, LoRACallback(r=2, target_modules=TARGETS), max_epochs=2)
        trainer.fit(cls(), *data())
        trainer = None
        gc.collect()
        assert sorted(patches()) == hooks, name
        found = dict(state_of_the_package())
        assert {key: found[key] for key in known} == known, name
    return used_on_one_device(path / f"after {dist.get_rank()}")


def test_plain_model_after_fits_under_strategies_is_used_as_in_a_fresh_process(tmp_path):
    expected, ranks = used_on_one_device(tmp_path / "fresh"), World(2)
    try:
        if find_spec("deepspeed") is not None:
            ranks.run(import_package, "deepspeed", timeout=240)  # its import takes a while
        for found in ranks.run(used_after_strategies, tmp_path, timeout=240):
            assert_same_bits(found, expected)
    finally:
        ranks.stop()
