"""Attached adapters under DDP, FSDP2 and tensor parallelism: as on one device, and nothing of theirs is sent."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    attach,
    detach,
    disable_adapter,
    inject,
    merged,
    merged_state_dict,
    scaled,
    set_strength,
    take_adapter,
)
from support.models.networks import randomise_
from support.ranks.processes import world
from support.ranks.sharded import WAYS, X, base_of, network, shard_, whole, whole_state
from support.ranks.sharded_adapters import PLANS, TENSOR_X, adapters, assert_same_bits, block, injected, mesh
from support.runs.recorders import Traffic

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def other(make: Any, rank: int) -> Any:
    """An adapter of another rank on the same base, without the last layer."""
    model = make(config=None) if make is block else network()
    inject(model, LoRAConfig(r=rank, lora_alpha=rank, target_modules=["up", "down"] if make is block else ["0", "4"]))
    randomise_(model, 0.3)
    return take_adapter(model)


def attach_(model: nn.Module, make: Any) -> nn.Module:
    for rank, name in ((1, "one"), (2, "two")):
        attach(model, other(make, rank), name=name, strength=0.5)
    return model


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def assert_as_alone(model: nn.Module, alone: nn.Module, x: torch.Tensor, x_alone: torch.Tensor) -> None:
    """Steps, merged weights and every strength are those of one device; W keeps its bits."""
    before = base_of(whole_state(model))
    optimizers = [torch.optim.AdamW(adapters(each), lr=0.05) for each in (model, alone)]
    for _ in range(2):
        for each, optimizer, data in zip((model, alone), optimizers, (x, x_alone), strict=True):
            optimizer.zero_grad()
            whole_tensor(each(data)).square().mean().backward()
            optimizer.step()

    def compare() -> None:
        with torch.no_grad():
            torch.testing.assert_close(whole_tensor(model(x)), alone(x_alone), **CLOSE)

    compare()
    with merged(model), merged(alone):
        compare()
        state = whole(merged_state_dict(model))
        for name, value in merged_state_dict(alone).items():
            torch.testing.assert_close(state[name], value, **CLOSE)
    for each in (model, alone):
        set_strength(each, -0.3, "one")
    compare()
    with scaled(model, {"": 0.0, "two": 2.0}), scaled(alone, {"": 0.0, "two": 2.0}):
        compare()
    with disable_adapter(model), disable_adapter(alone):
        compare()
    for each in (model, alone):
        detach(each, "two")
    compare()
    assert_same_bits(base_of(whole_state(model)), before)


def fully_sharded(way: str) -> None:
    model, alone = (attach_(injected(), injected) for _ in "ab")
    assert_as_alone(shard_(model, **WAYS[way]), alone, X, X)
    with pytest.raises(LoRAError, match="sharded already"):
        attach(model, other(injected, 3), name="late")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by columns", "offloaded"])
def test_fsdp2_equals_one_device_and_refuses_to_attach_later(way: str):
    world().run(fully_sharded, way)


def tensor_parallel(plan: str) -> Any:
    """What a forward sends without attached adapters and with them, after all was compared with one device."""
    # torch's parallel styles make new parameters, which need gradients and have no first values.
    warnings.filterwarnings("ignore", "lightning_lora. disable_adapter cannot bring back")
    bare, model, alone = block(), *(attach_(block(), block) for _ in "ab")
    x = TENSOR_X.chunk(2, dim=1)[dist.get_rank()] if plan == "sequence" else TENSOR_X
    sent = []
    for each in (bare, model):
        parallelize_module(each, mesh(), PLANS[plan])
        with Traffic() as traffic:
            each(x)
        sent.append(traffic.sent)
    assert_as_alone(model, alone, x, TENSOR_X)
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["even", "sequence"])
def test_tensor_parallelism_equals_one_device_and_sends_no_more_than_without(plan: str):
    for without, beside in world().run(tensor_parallel, plan):
        assert without == beside


def data_parallel() -> None:
    model = attach_(injected(), injected)
    alone, x = copy.deepcopy(model), X.chunk(2)[dist.get_rank()]
    packed = copy.deepcopy(model[0].lora.attached)
    wrapped = DistributedDataParallel(model)
    with Traffic() as forward:
        loss = wrapped(x).square().mean()
    assert not forward.sent
    loss.backward()
    alone(X).square().mean().backward()
    for one, single in zip(adapters(model), adapters(alone), strict=True):
        torch.testing.assert_close(one.grad, single.grad, **CLOSE)
    assert torch.equal(packed.b, model[0].lora.attached.b)
    with scaled(wrapped, 0.0), torch.no_grad():
        off = wrapped(x)
    with scaled(alone, 0.0):
        torch.testing.assert_close(off, alone(x), **CLOSE)


def test_ddp_trains_as_one_device_and_sends_nothing_in_a_forward():
    world().run(data_parallel)
