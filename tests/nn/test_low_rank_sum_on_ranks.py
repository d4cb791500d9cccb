"""The operation that a GPU runs for a factored linear layer, on two ranks. The CPU is made to choose it here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback
from lightning_lora.nn.linear import LoRALinear
from support.covering import covering
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import Plain, Sharded, data, make_trainer, model_parallel, whole_state
from support.ranks.sharded_adapters import lora

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
}


def with_ddp(path: Path, callback: LoRACallback) -> L.Trainer:
    return make_trainer(path, callback, strategy=DDPStrategy(process_group_backend=BACKEND), devices=2)


STRATEGIES = {"fsdp2": (Sharded, model_parallel), "ddp": (Plain, with_ddp)}


@contextmanager
def as_one() -> Iterator[list[int]]:
    """Let linear layers run as one operation on the CPU too, where a GPU would. Yield a list with its calls."""
    calls: list[int] = []
    patch = pytest.MonkeyPatch()

    def as_one(self: LoRALinear, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return self._as_one(rows, a, b)

    patch.setattr(LoRALinear, "_accumulated", as_one)
    try:
        yield calls
    finally:
        patch.undo()


def fit(path: Path, strategy: str, options: dict[str, Any], one: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    kind, trainer = STRATEGIES[strategy]
    torch.manual_seed(0)
    model = kind()
    callback = lora(**options)
    if not one:
        trainer(path, callback).fit(model, *data())
        return model.losses, whole_state(model.to("cpu"))
    with as_one() as calls:
        trainer(path, callback).fit(model, *data())
    assert calls
    return model.losses, whole_state(model.to("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("option", "strategy"), covering([*OPTIONS], [*STRATEGIES], meet=1))
def test_fit_as_one_operation_equals_the_cpus_own_way(tmp_path, strategy, option):
    expected_losses, expected = world().run(fit, tmp_path / "plain", strategy, OPTIONS[option], False)[0]
    for losses, state in world().run(fit, tmp_path / "one", strategy, OPTIONS[option], True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
