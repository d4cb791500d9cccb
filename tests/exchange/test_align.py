"""An adapter under the names of one model: which words of its options hold there, and whose adapter is meant."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    load_adapter,
    save_adapter,
    take_adapter,
    unload,
)
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import (
    base_zoo,
    checkpoint,
    randomise_,
    tokens,
    train,
    zoo_config,
)
from support.runs.training import own_random_stream


def test_options_are_the_words_of_the_run_whatever_they_name_without_the_prefix():
    options = {"rank_pattern": {r"model\.body\.0": 4}, "alpha_pattern": {r"model\.embed": 3}, "use_rslora": True}
    model, other = nn.ModuleDict({"model": base_zoo()}), base_zoo()
    inject(model, zoo_config(r=2, lora_alpha=5, target_modules=r"model\.(embed|body\.[03]|conv)", **options))
    train(model["model"])
    load_adapter(other, checkpoint(model.eval(), "adapter"))
    assert open_model(other, "test").injection.config == open_model(model, "test").injection.config
    layers, here = take_adapter(model).layers, take_adapter(other).layers
    assert {name.removeprefix("model."): layer for name, layer in layers.items()} == here
    assert torch.equal(other(tokens()), model["model"](tokens()))


class Headed(nn.Module):
    """Around a network, and with biased layers of its own, one called as one of the network's."""

    def __init__(self) -> None:
        super().__init__()
        with own_random_stream(1):
            self.network, self.head, self.last = network(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)


class HeadedLit(L.LightningModule, Headed):
    """The same, with a Trainer's module."""


def network() -> nn.Sequential:
    with own_random_stream(0):
        return nn.Sequential(
            OrderedDict(first=nn.Linear(6, 8), norm=nn.LayerNorm(8), last=nn.Linear(8, 4), other=nn.Linear(4, 4))
        )


@pytest.mark.parametrize(
    ("source", "build", "options"),
    covering(
        ["folder", "checkpoint", "saved again", "saved around"],
        [Headed, HeadedLit],
        [{"bias": "all"}, {"modules_to_save": ["last"]}, {"bias": "lora_only"}],
        meet=1,
    ),
)
def test_options_of_a_network_mean_nothing_around_it(tmp_path: Path, source: str, build: type, options: dict[str, Any]):
    inner = network()
    inject(inner, LoRAConfig(r=2, target_modules=["first"], **options))
    randomise_(inner)
    trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    wanted = inner(x := torch.randn(3, 6))
    save_adapter(inner, tmp_path / "network")
    adapter: Any = {"folder": tmp_path / "network", "checkpoint": checkpoint(inner, "adapter")}.get(source)
    if adapter is None:
        if source == "saved again":
            load_adapter(first := build(), tmp_path / "network")
        else:
            first = build().requires_grad_(False)
            first.network = inner
        save_adapter(first, adapter := tmp_path / "again")
    load_adapter(model := build(), adapter)
    assert torch.equal(model(x), wanted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"network.{name}" for name in trained}
    load_adapter(alone := network(), adapter)
    assert torch.equal(alone(x), wanted)
    unload(model)
    assert model.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(model(x), network()(x))
