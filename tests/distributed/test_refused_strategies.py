"""Strategies that cannot be right are refused at setup, before the model is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from plain import trace
from sharded import Plain, Sharded, model_parallel
from test_fsdp_life import data, lora
from world import world

from lightning_lora import LoRAError, is_merged


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
def test_the_reason_and_the_alternative(strategy, reason):
    model = Plain()
    before = trace(model)
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    with pytest.raises(LoRAError, match=reason) as caught:
        lora().setup(trainer, model, "fit")
    assert "Use ModelParallelStrategy with fully_shard (FSDP2)" in str(caught.value)
    assert "strategy='ddp'" in str(caught.value)
    assert trace(model) == before


def test_others_are_not():
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    lora().setup(trainer, Plain(), "fit")


def verifying(path: Any) -> None:
    model = Sharded()
    with pytest.raises(LoRAError, match="verify: FSDPSharded is sharded"):
        model_parallel(path, lora(verify=True)).validate(model, data()[1], verbose=False)
    assert not is_merged(model)
    assert dist.get_world_size() == 2


def test_verifying_a_sharded_model_is_refused(tmp_path):
    world().run(verifying, tmp_path)
