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
from support.models import randomise_
from support.processes import BACKEND, world

DEVICE = "cpu" if BACKEND == "gloo" else "cuda"
WAYS = ["layers", "root only"]


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


def sharded_reports(way: str, share: float) -> list[str]:
    net = adapted(share)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in [] if way == "root only" else net if way == "layers" else [net[0]]:
        fully_shard(layer, mesh=mesh)
    if way != "one layer":
        fully_shard(net, mesh=mesh)
    return reports(net)


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_the_16_bit_report_of_a_sharded_model_equals_that_of_one_device(way: str, share: float):
    expected = reports(adapted(share))
    assert ["rounding costs" in line for line in expected] == [True]
    others = expected if share == 0.01 else []  # every rank warns, and the first one logs
    assert world().run(sharded_reports, way, share) == [expected, others]


def test_the_16_bit_report_counts_a_layer_that_is_whole_on_every_rank_once():
    assert world().run(sharded_reports, "one layer", 0.01) == [reports(adapted(0.01))] * 2
