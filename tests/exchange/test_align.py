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
from support.covering import covering
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
def test_options_are_the_words_of_the_run_whatever_they_name_without_the_prefix(use_rslora: bool):
    options = {"rank_pattern": {r"model\.body\.0": 4}, "alpha_pattern": {r"model\.embed": 3}, "use_rslora": use_rslora}
    model = trained_around(r=2, lora_alpha=5, target_modules=r"model\.(embed|body\.[03]|conv)", **options)
    other = base_zoo()
    load_adapter(other, checkpoint(model, "adapter"))
    assert open_model(other, "test").record.config == open_model(model, "test").record.config
    layers, here = take_adapter(model).layers, take_adapter(other).layers
    assert {name.removeprefix("model."): layer for name, layer in layers.items()} == here
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


@pytest.mark.parametrize(("holder", "form", "part"), covering([*HOLDERS], FORMS, ["whole", "encoder"]))
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
