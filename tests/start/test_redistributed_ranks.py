"""Options that redistribute_ranks returns: beside a user's own patterns, and how far a rank may grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, redistribute_ranks
from lightning_lora.start import ranks


def adapted(**options: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, LoRAConfig(**{"r": 3, "init_lora_weights": "eva"} | options))
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=generator) for _ in range(40)]


@pytest.mark.parametrize("pattern", [r"\d", "^0"], ids=["of all layers", "of the layer alone"])
def test_new_ranks_come_before_those_that_a_users_pattern_gives(monkeypatch: pytest.MonkeyPatch, pattern: str):
    monkeypatch.setattr(ranks, "_divide", lambda budget, *components: {"0": 4, "1": 2})
    model = adapted(rank_pattern={pattern: 3}, alpha_pattern={pattern: 6})
    config = redistribute_ranks(model, batches())
    assert [config.rank(name) for name in "01"] == [4, 2]
    assert config.scaling("0") == 2  # as before
    assert inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config) == ["0", "1"]


@pytest.mark.parametrize(("r", "rho", "most"), [(3, 1.9, 6), (3, 1.4, 4), (2, 1, 2), (3, 9, 8)])
def test_a_rank_may_grow_to_the_nearest_multiple_and_no_further_than_the_layer(
    monkeypatch: pytest.MonkeyPatch, r: int, rho: float, most: int
):
    sizes: set[int] = set()

    def divide(budget: int, components: Any, *explained: Any) -> dict[str, int]:
        sizes.update(each.size for each in components.values())
        return dict.fromkeys(components, r)

    monkeypatch.setattr(ranks, "_divide", divide)
    redistribute_ranks(adapted(r=r), batches(), rho=rho)
    assert sizes == {most}
