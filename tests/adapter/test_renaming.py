"""load_adapter finds the one prefix under which an adapter's names fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter, take_adapter, unload
from support.covering import covering
from support.models.networks import (
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
from support.runs.training import own_random_stream


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


PATTERN = r"model\.(embed|body\.[03])"
FULL_NAMES: dict[str, Any] = {
    "target_modules": [f"model.{name}" for name in ZOO_LAYERS],
    "modules_to_save": ["model.head"],
    "rank_pattern": {"model.conv": 3},
    "alpha_pattern": {"model.body.0": 3},
    "enable_lora": {"model.body.3": [True, False]},
}


@pytest.mark.parametrize(
    ("options", "target"),
    [({}, "injected"), (FULL_NAMES, "fresh"), (FULL_NAMES, "injected"), ({"target_modules": PATTERN}, "fresh")],
)
def test_load_adapter_takes_a_prefix_off(options, target):
    model, other = trained_around(**options), base_zoo()
    if target == "injected":
        off = {"rank_pattern": {"conv": 3}, "alpha_pattern": {"body.0": 3}, "enable_lora": {"body.3": [True, False]}}
        inject(other, zoo_config(**off if options else {}))
    names = load_adapter(other, checkpoint(model, "adapter"))
    assert names == [name for name in ZOO_LAYERS if hasattr(model.model.get_submodule(name), "lora_A")]
    assert state_bits(other) == state_bits(model.model)
    assert torch.equal(other(tokens()), model.model(tokens()))


@pytest.mark.parametrize(("form", "inner"), [("dictionary", True), ("folder", False)])
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


def test_a_layer_under_two_names_loads_under_a_prefix(tmp_path: Path):
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
    save_adapter(inner, tmp_path / "folder")
    for adapter in (tmp_path / "folder", checkpoint(inner, "adapter")):
        load_adapter(around := Whole(), adapter)
        assert state_bits(around.network) == state_bits(inner)


class Encoder(nn.Sequential):
    """Stands in for a SentenceTransformer."""

    def __init__(self) -> None:
        with own_random_stream(0):
            super().__init__(OrderedDict(body=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))))
            self.top = nn.Linear(8, 4)


class Loss(nn.Module):
    """Holds the model, as the losses of sentence-transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).square().mean()


class Holder(L.LightningModule):
    """Holds modules by name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def two_losses() -> nn.Module:
    return Holder(loss=Loss(model := Encoder()), other=Loss(model))


HOLDERS: dict[str, Callable[[], nn.Module]] = {
    "encoder": Encoder,
    "loss": lambda: Loss(Encoder()),
    "only in the loss": lambda: Holder(loss=Loss(Encoder())),
    "loss first": lambda: Holder(loss=Loss(model := Encoder()), model=model),
    "model first": lambda: Holder(model=(model := Encoder()), loss=Loss(model)),
    "two losses": two_losses,
    "no LightningModule": lambda: nn.ModuleDict({"loss": Loss(model := Encoder()), "model": model}),
}


WITH_TOP: dict[str, Any] = {"r": 2, "target_modules": ["body.0", "body.2"], "modules_to_save": ["top"], "bias": "all"}


def encoder_in(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, Encoder))


def trained_encoder(holder: str, part: str) -> nn.Module:
    model = HOLDERS[holder]().requires_grad_(False)
    inject(encoder_in(model) if part == "encoder" else model, LoRAConfig(**WITH_TOP))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


FORMS = ["folder", "adapter", "merged", "full", "in memory", "state dict"]


@pytest.mark.parametrize(("holder", "form", "part"), covering([*HOLDERS], FORMS, ["whole", "encoder"], meet=1))
def test_an_adapter_of_a_model_that_a_loss_holds_too_loads_wherever_the_model_is(
    tmp_path: Path, holder: str, part: str, form: str
):
    model, x = trained_encoder(holder, part), torch.randn(3, 6)
    wanted = encoder_in(model)
    adapter: Any = tmp_path
    if form == "folder":
        save_adapter(model, tmp_path)
    elif form == "in memory":
        adapter = take_adapter(model)
    else:
        adapter = checkpoint(model, "bare" if form == "state dict" else form)
    for build in HOLDERS.values():
        other = build()
        if form == "state dict":
            inject(other, LoRAConfig(**WITH_TOP))
        load_adapter(other, adapter)
        encoder = encoder_in(other)
        assert state_bits(encoder) == state_bits(wanted)
        assert torch.equal(encoder(x), wanted(x))
        flags = ({n: p.requires_grad for n, p in each.named_parameters()} for each in (encoder, wanted))
        assert next(flags) == next(flags)
        unload(other)
        assert state_bits(other) == state_bits(build())
