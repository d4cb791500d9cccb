"""A rank that dies or fails: the others end with an error in bounded time, and the last checkpoint resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import is_merged
from support.ranks.processes import BACKEND, LOST_CONNECTION, World, world
from support.ranks.sharded import (
    BATCHES,
    Plain,
    Sharded,
    base_of,
    data,
    make_trainer,
    model_parallel,
    optimizer_state,
    whole_state,
)
from support.ranks.sharded_adapters import assert_same_run, lora

EPOCHS, DIES_IN = 4, 2


class Dying:
    """Rank 1 is killed in the middle of an epoch, if `dies`."""

    dies = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.dies and self.global_step == DIES_IN * BATCHES + 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class DyingPlain(Dying, Plain):
    pass


class DyingSharded(Dying, Sharded):
    pass


def trainer(path: Path, kind: str, *callbacks: Any) -> Any:
    checkpoint = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    options = {"enable_checkpointing": True, "max_epochs": EPOCHS}
    if kind == "ddp":
        options |= {"devices": dist.get_world_size(), "strategy": DDPStrategy(process_group_backend=BACKEND)}
        return make_trainer(path, lora(), checkpoint, *callbacks, **options)
    return model_parallel(path, lora(), checkpoint, *callbacks, **options)


def run(path: Path, kind: str, dies: bool, source: Path | None = None) -> Any:
    torch.manual_seed(0)
    model = DyingPlain() if kind == "ddp" else DyingSharded()
    model.dies = dies
    fitting = trainer(path, kind)
    fitting.fit(model, *data(), ckpt_path=source)
    return whole_state(model), optimizer_state(fitting)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_killed_rank_ends_the_others_and_the_last_checkpoint_resumes(tmp_path, kind):
    ended = World(2).run_broken(run, tmp_path / "killed", kind, True)
    assert sorted(ended) == [0]
    for error in ended.values():
        assert "RuntimeError" in error
        assert any(words in error for words in LOST_CONNECTION), error
    uninterrupted = world().run(run, tmp_path / "whole", kind, False)[0]
    last = tmp_path / "killed" / f"epoch={DIES_IN - 1}.ckpt"
    assert not (tmp_path / "killed" / f"epoch={DIES_IN}.ckpt").exists()
    for found in world().run(run, tmp_path / "killed", kind, False, last):
        assert_same_run(found, uninterrupted)


def failing_save(path: Path, kind: str) -> None:
    model = Sharded() if kind == "fsdp2" else Plain()
    before = base_of(whole_state(model))
    if dist.get_rank() == 0:

        def fail(*args: Any, **options: Any) -> None:
            raise OSError("No space left on device")

        torch.save = fail
    try:
        trainer(path, kind).fit(model, *data())
    finally:
        assert not is_merged(model)
        assert {name for name, _ in model.named_parameters()} >= before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_first_rank_that_cannot_save_ends_the_others_with_an_error(tmp_path, kind):
    ended = World(2).run_broken(failing_save, tmp_path, kind)
    assert "No space left on device" in ended[0]
    # Under DDP the other rank waits alone in a barrier until the first one has ended.
    reasons = LOST_CONNECTION if kind == "ddp" else ("epoch=0.ckpt: OSError: No space left on device.",)
    assert any(reason in ended[1] for reason in reasons), ended[1]
