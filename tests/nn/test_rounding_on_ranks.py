"""What rounding of merged 16-bit weights costs: every rank of a sharded model reports what one device reports."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_lora import LoRAConfig, inject, merged
from support.models.networks import randomise_
from support.ranks.processes import BACKEND, world

DEVICE = "cpu" if BACKEND == "gloo" else "cuda"


def adapted(share: float) -> nn.Sequential:
    """Two bfloat16 layers whose rows lose more to rounding the later they come, so that ranks lose unequal shares."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(24, 33), nn.Linear(33, 21)).to(torch.bfloat16)
    inject(net, LoRAConfig(r=2))
    randomise_(net)
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(torch.logspace(-2, 1, len(layer.weight)).unsqueeze(1))
            delta = layer.lora_B @ layer.lora_A * layer.lora.spec.scaling
            layer.lora_B.mul_(share * layer.weight.float().norm() / delta.norm())
    return net


def reports(net: nn.Module) -> list[str]:
    """What a first merge and a second one log and warn of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning_lora")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with merged(net):
                    pass
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [*said, *(f"warning: {warning.message}" for warning in caught)]


CASES = (("layers", 0.01), ("layers", 0.5), ("root only", 0.01), ("one layer", 0.01))


def sharded_reports() -> list[list[str]]:
    found = []
    for way, share in CASES:
        net, mesh = adapted(share), init_device_mesh(DEVICE, (dist.get_world_size(),))
        for layer in {"layers": [*net], "root only": [], "one layer": [net[0]]}[way]:
            fully_shard(layer, mesh=mesh)
        if way != "one layer":  # the other one is whole on every rank, and counted once
            fully_shard(net, mesh=mesh)
        found.append(reports(net))
    return found


@pytest.mark.slow
def test_the_16_bit_report_of_a_sharded_model_equals_that_of_one_device():
    first, other = world().run(sharded_reports)
    expected = [reports(adapted(share)) for _, share in CASES]
    assert all(["rounding costs" in line for line in each] == [True] for each in expected)
    assert first == expected
    assert other == [
        each if share == 0.01 else [] for each, (_, share) in zip(expected, CASES, strict=True)
    ]  # warnings
