"""A copy or a pickle of a layer that computes with W' has W: it waits for another thread's forward."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, merge
from support.models.networks import randomise_, state_bits

COPIES: dict[str, Callable[[nn.Module], Any]] = {"copy": copy.deepcopy, "pickle": pickle.dumps}


class Hook:
    """Called in a forward; a copy or a pickle of a layer has none."""

    def __init__(self, call: Callable[[], Any] | None = None) -> None:
        self.call = call

    def __call__(self) -> None:
        if self.call is not None:
            self.call()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class OwnLinear(nn.Linear):
    """Runs on W', because its forward is its own."""

    inside = Hook()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inside()
        return super().forward(x).tanh()


class OwnLSTM(nn.LSTM):
    inside = Hook()

    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:
        result = super().forward(x, hx)
        self.inside()
        return result


class Reader(nn.Module):
    """Reads a layer's weight."""

    inside = Hook()

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inside()
        return F.linear(x, self.proj.weight)


def adapted(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = {"linear": lambda: OwnLinear(4, 4), "lstm": lambda: OwnLSTM(4, 4), "reader": Reader}[kind]()
    model = nn.ModuleDict({"layer": module})
    if kind == "lstm":
        inject(model, LoRAConfig(r=2, target_parameters=["weight_ih_l0"]))
    else:
        inject(model, LoRAConfig(r=2, target_modules=["proj" if kind == "reader" else "layer"]))
    randomise_(model, 0.5)
    return model


@pytest.mark.parametrize("kind", ["linear", "lstm", "reader"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_inside_the_forward_of_a_layer_on_its_sum_is_refused(kind: str, way: str):
    model = adapted(kind)
    before = state_bits(model)
    model["layer"].inside = Hook(lambda: COPIES[way](model))
    with torch.no_grad(), pytest.raises(LoRAError, match=r"outside of the (forward|method)"):
        model["layer"](torch.randn(3, 4))
    assert state_bits(model) == before
    model["layer"].inside = Hook()
    assert state_bits(copy.deepcopy(model)) == before


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_a_copy_beside_another_threads_forward_has_the_base_weights(kind: str):
    model, x = adapted(kind), torch.randn(3, 4)
    before = state_bits(model)
    inside, made = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        made.wait(0.3)  # a copy that waits for the forward is not made yet

    def forward() -> None:
        with torch.no_grad():
            model["layer"](x)

    model["layer"].inside = Hook(wait)
    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    assert inside.wait(10)
    copied = copy.deepcopy(model)
    made.set()
    thread.join(10)
    assert state_bits(copied) == before
    model["layer"].inside = Hook()
    with torch.no_grad():
        found, expected = copied["layer"](x), model["layer"](x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    merge(copied)
