"""Merging: layers that must stay factored, allowed changes to a merged weight, and two threads at once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_lora import LoRAConfig, inject, is_merged, merge, merge_and_unload, unmerge
from support.covering import covering
from support.models import bits, randomise_, state_bits, tokens

# --- layers that had to stay factored ---


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.mid(self.embed(x)).mean(1))
        return result


def tie(model: Reader) -> None:
    model.out.weight = model.embed.weight


def untie(model: Reader) -> None:
    model.out.weight = nn.Parameter(model.out.weight.detach().clone(), requires_grad=False)


OBSTACLES = {
    "tied": (tie, untie),
    "pruned": (lambda model: prune.identity(model.out, "weight"), lambda model: prune.remove(model.out, "weight")),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_merge_and_unload_of_a_layer_that_stayed_factored_and_need_not_any_more_keeps_its_adapter(obstacle: str):
    put, take_away = OBSTACLES[obstacle]
    model = Reader()
    inject(model, LoRAConfig(r=2, target_modules=["mid", "out"]))
    randomise_(model, 0.5)
    put(model)
    merge(model)
    take_away(model)
    assert is_merged(model)
    plain = bits(model.out.weight)
    delta = model.out.lora.spec.scaling * model.out.lora_B.double() @ model.out.lora_A.double()
    wanted = (model.out.weight.double() + delta).float().detach()
    expected = model(tokens()).detach()
    assert merge_and_unload(model) is model
    assert bits(model.out.weight) != plain
    torch.testing.assert_close(model.out.weight.detach(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(tokens()).detach(), expected, rtol=1e-5, atol=1e-5)
    assert type(model.out) is nn.Linear


# --- changes to a merged weight that are allowed ---


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


# --- two threads at once ---


@pytest.mark.slow
def test_two_threads_that_merge_and_unmerge_two_models_restore_every_bit():
    models = [stack(seed) for seed in (1, 2)]
    before = [state_bits(model) for model in models]
    expected = []
    for model in models:
        merge(model)
        expected.append([bits(layer.weight) for layer in model])
        unmerge(model)

    def cycles(model: nn.Sequential) -> list[list[bytes]]:
        found = []
        for _ in range(20):
            merge(model)
            found.append([bits(layer.weight) for layer in model])
            unmerge(model)
        return found

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(cycles, models))
    finally:
        sys.setswitchinterval(interval)
    assert results == [[weights] * 20 for weights in expected]
    assert [state_bits(model) for model in models] == before
