"""Strategies that would give wrong results are refused at setup, before the model is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from lightning_lora import LoRAError
from support.models import trace
from support.sharded import Plain
from support.sharded_adapters import lora


class OwnFSDP(FSDPStrategy):
    """A user's subclass is still FSDP1."""


def deepspeed() -> Any:
    return object.__new__(DeepSpeedStrategy)  # its own __init__ needs the library


REFUSED = [
    (deepspeed, "DeepSpeedStrategy cannot be used: .*checkpoint"),
    (FSDPStrategy, "FSDPStrategy cannot be used: FSDP1"),
    (OwnFSDP, "FSDPStrategy cannot be used: FSDP1"),
]


@pytest.mark.parametrize(("strategy", "reason"), REFUSED)
def test_strategy_that_cannot_be_right_is_refused_with_the_alternative(strategy, reason):
    model = Plain()
    before = trace(model)
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    with pytest.raises(LoRAError, match=reason) as caught:
        lora().setup(trainer, model, "fit")
    assert "Use ModelParallelStrategy with fully_shard (FSDP2)" in str(caught.value)
    assert "strategy='ddp'" in str(caught.value)
    assert trace(model) == before


def test_single_device_strategy_is_not_refused():
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    lora().setup(trainer, Plain(), "fit")
