"""load_adapter finds the one prefix under which an adapter's names fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lightning_lora.model.injection import require_injection
from support.models import (
    ZOO_LAYERS,
    base_zoo,
    checkpoint,
    randomise_,
    source,
    state_bits,
    tokens,
    trace,
    train,
    trained_zoo,
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


FULL_NAMES: dict[str, Any] = {
    "target_modules": [f"model.{name}" for name in ZOO_LAYERS],
    "modules_to_save": ["model.head"],
    "rank_pattern": {"model.conv": 3},
    "alpha_pattern": {"model.body.0": 3},
    "enable_lora": {"model.body.3": [True, False]},
}


@pytest.mark.parametrize("options", [{}, FULL_NAMES, {"target_modules": r"model\.(embed|body\.[03])"}])
@pytest.mark.parametrize("target", ["fresh", "injected"])
def test_load_adapter_takes_a_prefix_off(options, target):
    model, other = trained_around(**options), base_zoo()
    if target == "injected":
        off = (
            {"target_modules": ["embed", "body.0", "body.3"]} if isinstance(options.get("target_modules"), str) else {}
        )
        if options is FULL_NAMES:
            off = {
                "rank_pattern": {"conv": 3},
                "alpha_pattern": {"body.0": 3},
                "enable_lora": {"body.3": [True, False]},
            }
        inject(other, zoo_config(**off))
    names = load_adapter(other, checkpoint(model, "adapter"))
    assert names == [name for name in ZOO_LAYERS if hasattr(model.model.get_submodule(name), "lora_A")]
    assert state_bits(other) == state_bits(model.model)
    assert torch.equal(other(tokens()), model.model(tokens()))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_layers_that_are_spelled_out_keep_the_common_options(use_rslora: bool):
    """An expression that names nothing without the prefix becomes a list; patterns name what differs from most."""
    options = {"rank_pattern": {r"model\.body\.0": 4}, "alpha_pattern": {r"model\.embed": 3}, "use_rslora": use_rslora}
    model = trained_around(r=2, lora_alpha=5, target_modules=r"model\.(embed|body\.[03]|conv)", **options)
    other = base_zoo()
    names = load_adapter(other, checkpoint(model, "adapter"))
    config = require_injection(other, "test").record.config
    assert (config.r, config.lora_alpha) == (2, 5)
    assert config.target_modules == tuple(names)
    assert (config.rank_pattern, config.alpha_pattern) == ({r"^body\.0": 4}, {"^embed": 3})
    assert torch.equal(other(tokens()), model.model(tokens()))


@pytest.mark.parametrize("form", ["dictionary", "folder"])
@pytest.mark.parametrize("inner", [False, True])
def test_load_adapter_puts_a_prefix_in_front(tmp_path, form, inner):
    model, other = trained_zoo(rank_pattern={"conv": 3}, alpha_pattern={"0": 5}), Around("model")
    if inner:
        inject(other.model, zoo_config(rank_pattern={"conv": 3}, alpha_pattern={"0": 5}))
    names = load_adapter(other, source(model, "adapter", form, tmp_path))
    assert names == [f"model.{name}" for name in ZOO_LAYERS]
    assert state_bits(other.model) == state_bits(model)
    assert torch.equal(other.eval().model(tokens()), model(tokens()))


def test_names_that_fit_as_they_are_need_no_prefix():
    outer = nn.ModuleDict({"embed": base_zoo().embed, "deeper": nn.ModuleDict({"embed": nn.Embedding(11, 8)})})
    inject(outer, LoRAConfig(r=1, target_modules=r"embed"))
    randomise_(outer)
    state = checkpoint(outer, "adapter")
    other = nn.ModuleDict({"embed": base_zoo().embed, "deeper": nn.ModuleDict({"embed": nn.Embedding(11, 8)})})
    other["deeper"].load_state_dict(outer["deeper"].state_dict())
    assert load_adapter(other, state) == ["embed"]


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: Around("one", "two"), r"found 'one\.', 'two\.'"),
        (lambda: Around(), "found none"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "found none"),
    ],
)
def test_no_prefix_or_several_are_an_error(build, found):
    state = checkpoint(trained_zoo(), "adapter")
    model = build()
    before = trace(model)
    with pytest.raises(LoRAError, match=rf"must fit \w+ under exactly one prefix; {found}.*Pass the submodule"):
        load_adapter(model, state)
    assert trace(model) == before
    if isinstance(model, Around) and len(model._modules) == 2:
        load_adapter(model.two, state)
        assert state_bits(model.one) == state_bits(base_zoo())


def test_one_layer_without_a_place_is_not_put_onto_the_model_itself():
    single = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    inject(single, LoRAConfig(r=1))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LoRAError, match="under exactly one prefix; found none"):
        load_adapter(model, checkpoint(single, "adapter"))


def test_a_module_under_two_names_is_one_place():
    def twice() -> nn.ModuleDict:
        inner = base_zoo()
        return nn.ModuleDict({"first": inner, "second": inner})

    model, other = twice(), twice()
    inject(model, zoo_config())
    randomise_(model)
    load_adapter(other, checkpoint(model, "adapter"))
    assert state_bits(other) == state_bits(model)
    third = twice()
    load_adapter(third, checkpoint(trained_zoo(), "adapter"))
    assert state_bits(third["first"]) == state_bits(trained_zoo())


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_a_layer_under_two_names_loads_under_a_prefix(form: str, tmp_path: Path):
    """Also where the network that holds it has two names as well."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Sequential(nn.Linear(8, 8))
            self.head = nn.Linear(8, 8)

    class Whole(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with own_random_stream(0):
                self.network = Network()
            self.again = self.network

    inner = Whole().network
    inject(inner, LoRAConfig(r=2))
    randomise_(inner)
    if form == "folder":
        save_adapter(inner, tmp_path / "folder")
    load_adapter(around := Whole(), tmp_path / "folder" if form == "folder" else checkpoint(inner, "adapter"))
    assert state_bits(around.network) == state_bits(inner)
