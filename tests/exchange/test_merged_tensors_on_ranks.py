"""merged_tensors of sharded models: whole on every rank, equal to one device, one at a time; an error on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from lightning_lora import LoRAError, is_merged, merge, merge_and_unload, merged_tensors
from lightning_lora.exchange import merged_tensors as one_by_one
from support.ranks.processes import world
from support.ranks.sharded import X, shard_, whole_state
from support.ranks.sharded_adapters import PLAN, assert_same_bits, block, injected, mesh

KINDS = ["root alone", "offloaded", "tensor parallel"]


def on_one_device(kind: str) -> nn.Module:
    if kind == "tensor parallel":
        return block()
    return injected(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)


def sharded(kind: str) -> nn.Module:
    net = on_one_device(kind)
    if kind == "tensor parallel":
        return parallelize_module(net, mesh(), PLAN)
    if kind == "offloaded":
        return shard_(net, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return shard_(net, root_only=kind == "root alone")


def taken(kind: str) -> list[dict[str, torch.Tensor]]:
    net, found = sharded(kind), []
    x = torch.ones(2, 6, dtype=next(net.parameters()).dtype)
    before = whole_state(net)
    for state in ("unmerged", "merged"):
        merge(net) if state == "merged" else None
        with torch.no_grad():
            net(x)  # the root now shows gathered weights
        tensors = {}
        for name, tensor in merged_tensors(net):
            assert not isinstance(tensor, DTensor)
            tensors[name] = tensor.cpu()
            with torch.no_grad():
                net(x)  # and again between two of them
        found.append(tensors)
        assert is_merged(net) == (state == "merged")
        assert_same_bits(whole_state(net), before)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_the_tensors_of_one_device(kind: str):
    expected = merge_and_unload(on_one_device(kind)).state_dict()
    for ranks in world().run(taken, kind):
        for found in ranks:
            assert list(found) == list(expected)
            assert_same_bits(found, expected)


class Gathers:
    """Counts gathers, and keeps the size of the largest tensor."""

    def __init__(self, gather: Any) -> None:
        self.gather, self.count = gather, 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        whole: torch.Tensor = self.gather(tensor)
        return whole


def one_gather_each() -> list[int]:
    net, counts = sharded("layers"), []
    one_by_one.full_tensor, gather = Gathers(one_by_one.full_tensor), one_by_one.full_tensor
    try:
        for _ in merged_tensors(net):
            counts.append(one_by_one.full_tensor.count)
    finally:
        one_by_one.full_tensor = gather
    return counts


def changed_on_one_rank() -> str:
    net = sharded("layers")
    tensors = merged_tensors(net)
    next(tensors)
    if dist.get_rank() == 0:
        with torch.no_grad():
            net.get_parameter("4.lora_B").to_local().add_(1.0)  # type: ignore[operator]
    with pytest.raises(LoRAError) as caught:
        list(tensors)
    net(X)  # the ranks are in step
    return str(caught.value)


@pytest.mark.slow
def test_fsdp2_gathers_one_at_a_time_and_an_error_of_one_rank_is_raised_on_all():
    for counts in world().run(one_gather_each):
        assert counts == list(range(1, len(counts) + 1))
    first, second = world().run(changed_on_one_rank)
    assert "'4.lora_B' has changed since the first tensor" in first
    assert "failed on another rank" in second
