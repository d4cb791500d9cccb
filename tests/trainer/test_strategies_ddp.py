"""DDP: the same adapters on all ranks, equal to one process on the same global batches; only their gradients travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_lora import LoRACallback, LoRAConfig, inject, is_merged, load_adapter, save_adapter
from support.models.networks import randomise_
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import BATCHES, TARGETS, Plain, base_of, data, loader, make_trainer, whole_state
from support.ranks.sharded_adapters import assert_same_bits, lora

pytestmark = pytest.mark.usefixtures("devices_of_ranks")
OPTIONS: dict[str, dict[str, Any]] = {
    "unused parameters": {"find_unused_parameters": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
}


class Watched(Plain):
    """Notes whether validation is merged, and which data it sees."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.seen: list[tuple[bool, int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((is_merged(self), len(batch[0])))
        super().validation_step(batch, batch_idx)


def fit(path: Path, strategy: dict[str, Any], *callbacks: LoRACallback) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(dist.get_rank())  # another stream on every rank
    model = Watched()
    options = {"devices": dist.get_world_size(), "strategy": DDPStrategy(process_group_backend=BACKEND, **strategy)}
    trainer = make_trainer(path, *callbacks, **options)
    trainer.fit(model, *data())
    assert all(merged for merged, _ in model.seen)
    assert len(model.seen) == 3 * BATCHES
    trainer.save_checkpoint(path / "3.ckpt")
    return model.losses, whole_state(model)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Plain()
    make_trainer(tmp_path_factory.mktemp("alone"), lora()).fit(model, loader(), loader(seed=6))
    return model.losses, whole_state(model)


@pytest.mark.parametrize("option", OPTIONS)
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path, alone, option):
    first, second = world().run(fit, tmp_path, OPTIONS[option], lora())
    assert_same_bits(first[1], second[1])
    assert first[0] == second[0] == pytest.approx(alone[0], rel=1e-5)
    for name, value in alone[1].items():
        torch.testing.assert_close(first[1][name], value, rtol=1e-4, atol=1e-6)
    assert_same_bits(base_of(first[1]), base_of(alone[1]))
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    assert_same_bits(saved, {name: value for name, value in first[1].items() if "lora_" in name})


class Counting(Plain):
    """Counts the bytes of gradients that DDP sends."""

    def on_fit_start(self) -> None:
        self.sent = 0
        self.trainer.strategy.model.register_comm_hook(None, self.count)

    def count(self, state, bucket):  # DDP refuses annotations as strings
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)


def counted(path: Path) -> tuple[int, int]:
    """Bytes of gradients that a step sends, and of the adapters."""
    model = Counting()
    strategy = DDPStrategy(process_group_backend=BACKEND)
    trainer = make_trainer(path, lora(), devices=dist.get_world_size(), strategy=strategy, max_steps=1)
    trainer.fit(model, *data())
    return model.sent, sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)


def test_a_step_sends_the_gradients_of_the_adapters(tmp_path):
    for sent, factors in world().run(counted, tmp_path):
        assert sent == factors > 0


# --- what one process alone has done before the fit ---


def loaded_on_the_first(path: Path, source: Path) -> dict[str, torch.Tensor]:
    model = Plain()
    if dist.get_rank() == 0:
        load_adapter(model, source)
    strategy = DDPStrategy(process_group_backend=BACKEND)
    make_trainer(path, lora(lora_alpha=4), devices=dist.get_world_size(), strategy=strategy).fit(model, *data())
    return whole_state(model)


def folder_of(path: Path, **options: Any) -> Path:
    inject(net := Plain(), LoRAConfig(r=2, target_modules=TARGETS, **options))
    randomise_(net, 0.3)
    save_adapter(net, path)
    return path


@pytest.mark.slow
def test_adapter_that_the_first_process_alone_loaded_is_sent_to_the_others(tmp_path):
    folder = folder_of(tmp_path / "adapter", lora_alpha=4)
    first, second = world().run(loaded_on_the_first, tmp_path, folder)
    assert_same_bits(first, second)
    load_adapter(model := Plain(), folder)
    make_trainer(tmp_path, lora(lora_alpha=4)).fit(model, loader(), loader(seed=6))
    for name, value in whole_state(model).items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
