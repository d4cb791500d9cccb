"""Changes to a merged weight that are allowed: unmerge gives what they make of an unmerged model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, is_merged, merge, unmerge
from support.covering import covering
from support.models import randomise_, state_bits


def stack(seed: int = 1, width: int = 24) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    return model


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load": lambda model: model.load_state_dict(stack(2).state_dict()),
    "load and assign": lambda model: model.load_state_dict(stack(2).state_dict(), assign=True),
    "load what it holds": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "half": lambda model: model.half(),
    "to float64": lambda model: model.to(torch.float64),
    "to the device that it is on": lambda model: model.to("cpu"),
    "another base": lambda model: model.load_state_dict(
        {name: value for name, value in stack(3).state_dict().items() if "lora_" not in name}
    ),
}


@pytest.mark.parametrize(("change", "budget"), covering([*CHANGES], [2**26, 0], meet=1))
def test_unmerge_after_an_allowed_change_gives_what_the_change_makes_of_an_unmerged_model(
    monkeypatch, change: str, budget: int
):
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", budget)
    model, twin = stack(), stack()
    merge(model)
    for changed in (model, twin):
        CHANGES[change](changed)
    assert is_merged(model)
    unmerge(model)
    assert state_bits(model) == state_bits(twin)
