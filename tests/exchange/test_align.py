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
    LoRAError,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    take_adapter,
    unload,
)
from lightning_lora.model.adapted_model import open_model
from support.models import (
    base_zoo,
    checkpoint,
    randomise_,
    tokens,
    train,
    zoo_config,
)
from support.training import own_random_stream


class Around(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, base_zoo())


def trained_around(**options: Any) -> Around:
    model = Around("model")
    inject(model, zoo_config(**options))
    train(model.model)
    return model.eval()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_options_are_the_words_of_the_run_whatever_they_name_without_the_prefix(use_rslora: bool):
    options = {"rank_pattern": {r"model\.body\.0": 4}, "alpha_pattern": {r"model\.embed": 3}, "use_rslora": use_rslora}
    model = trained_around(r=2, lora_alpha=5, target_modules=r"model\.(embed|body\.[03]|conv)", **options)
    other = base_zoo()
    load_adapter(other, checkpoint(model, "adapter"))
    assert open_model(other, "test").record.config == open_model(model, "test").record.config
    layers, here = take_adapter(model).layers, take_adapter(other).layers
    assert {name.removeprefix("model."): layer for name, layer in layers.items()} == here
    assert torch.equal(other(tokens()), model.model(tokens()))


def test_two_networks_with_adapters_of_their_own_are_not_taken_for_one():
    inject(two := Around("one", "two"), zoo_config())
    randomise_(two)
    with torch.no_grad():
        two.two.conv.lora_B.add_(1)
    with pytest.raises(LoRAError, match="under exactly one prefix; found none"):
        load_adapter(base_zoo(), checkpoint(two, "adapter"))


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


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["last"]}])
@pytest.mark.parametrize("source", ["folder", "checkpoint", "saved again", "saved around"])
@pytest.mark.parametrize("build", [Headed, HeadedLit])
def test_options_of_a_network_mean_nothing_around_it(tmp_path: Path, build: type, source: str, options: dict[str, Any]):
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


def test_a_network_that_a_lightning_module_did_not_inject_itself_loads_from_its_checkpoint(tmp_path: Path):
    model = HeadedLit().requires_grad_(False)
    inject(model.network, LoRAConfig(r=2, target_modules=["first"], bias="all"))
    randomise_(model.network)
    torch.save({**checkpoint(model, "adapter"), "pytorch-lightning_version": L.__version__}, tmp_path / "a.ckpt")
    again = load_from_checkpoint(HeadedLit, tmp_path / "a.ckpt")
    assert torch.equal(again(x := torch.randn(3, 6)), model(x))
