"""What a module writes into state_dict() of its own, where a strategy divides the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_lora import load_adapter, load_from_checkpoint
from support.ranks.fsdp1 import fsdp1
from support.ranks.processes import world
from support.ranks.sharded import Plain, Sharded, data, model_parallel
from support.ranks.sharded_adapters import lora

SAVED, BUILT = 7, 3


class Extra(nn.Module):
    number = BUILT

    def get_extra_state(self) -> Any:
        return {"number": torch.tensor(self.number), "of": ["each", 2]}

    def set_extra_state(self, state: Any) -> None:
        assert state["of"] == ["each", 2]
        self.number = int(state["number"])


class Counting(Plain):
    """Has metrics that are saved, and extra state."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.extra = Extra()
        self.total, self.all = torchmetrics.SumMetric(), torchmetrics.CatMetric()
        for metric in (self.total, self.all):
            metric.persistent(True)
        self.mark(BUILT)

    def mark(self, number: int) -> None:
        self.extra.number = number
        for metric in (self.total, self.all):
            metric.reset()
            for value in range(number):
                metric.update(value)

    def marked(self) -> Any:
        return self.extra.number, self.total.sum_value.item(), [value.item() for value in self.all.value]


class ShardedCounting(Counting, Sharded):
    pass


STRATEGIES = {
    "FSDP2": (ShardedCounting, model_parallel),
    "FSDP1": (Counting, fsdp1),
}


def run(strategy: str, path: Path, save: str, source: Path | None = None) -> Any:
    cls, make = STRATEGIES[strategy]
    trainer = make(path, lora(save=save), max_epochs=1 if source is None else 2)
    trainer.fit(model := cls(), *data(), ckpt_path=source)
    found = model.marked()
    model.mark(SAVED)
    trainer.save_checkpoint(path / "own.ckpt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "save"), [("FSDP2", "adapter"), ("FSDP1", "merged")])
def test_persistent_metrics_and_extra_state_come_back_where_a_strategy_divides_the_model(
    tmp_path, strategy: str, save: str
):
    (expected := Counting()).mark(SAVED)
    world().run(run, strategy, tmp_path, save)
    assert load_from_checkpoint(Counting, tmp_path / "own.ckpt").marked() == expected.marked()
    load_adapter(loaded := Counting(), tmp_path / "own.ckpt")
    assert loaded.marked() == expected.marked()
    for found in world().run(run, strategy, tmp_path / "resumed", save, tmp_path / "own.ckpt"):
        assert found == expected.marked()
