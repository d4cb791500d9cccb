"""lora_param_groups of an FSDP2 model: the sharded run equals that of a single device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_lora import lora_param_groups
from support.ranks.processes import world
from support.ranks.sharded import X, shard_, whole_state
from support.ranks.sharded_adapters import injected


def three_steps(net: nn.Module) -> list[tuple[str, int]]:
    optimizer = torch.optim.AdamW(lora_param_groups(net, lr=1e-2, lr_ratio=4, weight_decay=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    return [(group["name"], len(group["params"])) for group in optimizer.param_groups]


def sharded_run() -> None:
    net, alone = shard_(injected()), injected()
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    assert three_steps(net) == three_steps(alone)
    expected = alone.state_dict()
    for name, value in whole_state(net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_device():
    world().run(sharded_run)
