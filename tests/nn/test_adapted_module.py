"""Classes with a first base that has no __dict__, such as ABC or Generic: adapted, merged, copied, put back."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from dataclasses import dataclass, replace
from types import new_class
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig, inject, merged, unload
from lightning_lora.nn.adapted_module import AdaptedModule, Swapped
from lightning_lora.nn.adapted_weights import NOTHING, LayerSpec
from lightning_lora.nn.layer_kinds import adapt_
from lightning_lora.nn.parameter import adapt_parameter_
from lightning_lora.nn.token_rows import adapt_table_
from support.covering import covering
from support.models.layers import same_bits
from support.runs.broken_off import break_off

R, D = 2, 4
T = TypeVar("T")
NOTHING_TRAINED = LayerSpec(r=0, alpha=0, scaling=1, variant=NOTHING)


class Empty:
    __slots__ = ()


class Shows(Protocol):
    def show(self) -> str:
        """The module as text."""


class OneSlot:
    __slots__ = ("note",)


class Reads(L.LightningModule):
    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, height)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self.beside = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layer(*[x] * (3 if isinstance(self.layer, nn.MultiheadAttention) else 1))
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(frozen=True)
class Kind:
    cls: type[nn.Module]
    args: tuple[int, ...]
    x: torch.Tensor
    options: dict[str, Any]


BASES: dict[str, tuple[Any, ...]] = {
    "ABC": (ABC,),
    "Generic": (Generic[T],),
    "empty slots": (Empty,),
    "Protocol": (Shows,),
    "two": (Empty, ABC),
    "one slot": (ABC, OneSlot),
}
TOKENS, IMAGE, SERIES = torch.arange(6).view(2, 3), torch.randn(2, D, 5, 5), torch.randn(2, 3, D)
LAYER = {"target_modules": ["layer"]}
LSTM = {"target_modules": [], "target_parameters": ["weight_ih_l0"]}
ROWS = {"target_modules": ["beside"], "trainable_token_indices": {"layer": [1, 4]}}
KINDS = {
    "linear": Kind(nn.Linear, (D, 5), SERIES, LAYER),
    "dora": Kind(nn.Linear, (D, 5), SERIES, {**LAYER, "use_dora": True}),
    "embedding": Kind(nn.Embedding, (6, D), TOKENS, LAYER),
    "rows": Kind(nn.Embedding, (6, D), TOKENS, ROWS),
    "conv": Kind(nn.Conv2d, (D, 5, 3), IMAGE, LAYER),
    "lstm": Kind(nn.LSTM, (D, 5), SERIES, LSTM),
    "reader": Kind(Reads, (D, 5), SERIES, {"target_modules": ["proj"]}),
    "attention": Kind(nn.MultiheadAttention, (D, 2), SERIES, LAYER),
}


def own_class(bases: str, cls: type[nn.Module]) -> type[nn.Module]:
    name = f"Own{cls.__name__}After{bases.replace(' ', '')}"
    if name not in globals():  # where pickle looks it up
        globals()[name] = new_class(name, (*BASES[bases], cls), {}, lambda space: space.update(__module__=__name__))
    return globals()[name]


@pytest.mark.parametrize(("kind", "bases"), covering([*KINDS], [*BASES], meet=1))
def test_a_class_whose_first_base_has_no_dict_is_adapted_as_the_plain_one_and_put_back(kind: str, bases: str):
    case = KINDS[kind]
    cls = own_class(bases, case.cls)
    own, plain = Model(cls(*case.args)), Model(case.cls(*case.args))
    before = {name: value.clone() for name, value in own.state_dict().items()}
    for model in (own, plain):
        inject(model, LoRAConfig(r=R, **case.options))
    for parameter in own.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    plain.load_state_dict(own.state_dict())
    expected = plain(case.x)
    for adapted in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert isinstance(adapted.layer, Swapped)
        assert isinstance(adapted.layer, cls)
        assert same_bits(adapted(case.x), expected)
        with merged(adapted), merged(plain):
            assert same_bits(adapted(case.x), plain(case.x))
            torch.testing.assert_close(adapted(case.x), expected, rtol=1e-4, atol=1e-4)
        unload(adapted)
        assert type(adapted.layer) is cls
        assert adapted.state_dict().keys() == before.keys()
        assert all(same_bits(value, before[name]) for name, value in adapted.state_dict().items())


def test_a_subclass_of_a_swapped_class_with_a_first_base_is_put_back_too():
    layer = own_class("ABC", nn.Linear)(D, D)
    plain = copy.deepcopy(layer)
    model = Model(layer)
    inject(model, LoRAConfig(r=R, **LAYER))
    swapped = type(layer)
    layer.__class__ = type(f"FSDP{swapped.__name__}", (swapped,), {})  # as fully_shard does
    assert type(layer).__mro__[1:] == swapped.__mro__
    torch.testing.assert_close(model(SERIES), plain(SERIES))
    unload(model)
    assert not isinstance(layer, Swapped)
    assert isinstance(layer, type(plain))


def adapt_layer(model: nn.Module) -> None:
    adapt_(model[0], "0", NOTHING_TRAINED, None)


def adapt_weight(model: nn.Module) -> None:
    adapt_parameter_(model[0], "weight", "0.weight", NOTHING_TRAINED, None)


def adapt_rows(model: nn.Module) -> None:
    adapt_table_(model[1], "1", replace(NOTHING_TRAINED, rows=(1, 2)), None)


@pytest.mark.parametrize("adapt", [adapt_layer, adapt_weight, adapt_rows])
def test_a_module_whose_class_was_replaced_has_its_adapter_whatever_breaks_that_off(adapt: Any):
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))

    adapt(build())  # makes the class, so that each later call runs the same lines
    for line in range(1000):
        model = build()
        reached = break_off(lambda model=model: adapt(model), line)
        swapped = [module for module in model if isinstance(module, AdaptedModule)]
        assert all(adapter.lora for module in swapped for adapter in module.lora_adapters().values()), line
        if not reached:
            assert swapped
            assert line > 10
            return
