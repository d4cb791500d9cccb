"""Two threads in a layer that computes with W': both are right, and the weight stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
)
from support.models.networks import randomise_, state_bits


class Meeting:
    """Both threads are in the layer's forward, then the first leaves it, then the second goes on.

    Each waits for a moment only, so that a layer which lets one thread in at a time passes too.
    """

    def __init__(self) -> None:
        self.both_inside, self.first_left = threading.Barrier(2), threading.Event()

    def __call__(self) -> None:
        with suppress(threading.BrokenBarrierError):
            self.both_inside.wait(0.3)
        if threading.current_thread().name == "second":
            self.first_left.wait(0.3)


class MeetingLinear(nn.Linear):
    meet: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meet()
        return super().forward(x).tanh()


class MeetingAttention(nn.MultiheadAttention):
    meet: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.meet()
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [(MeetingLinear, 8), (MeetingAttention, 2)])
def test_two_threads_in_a_layer_that_runs_on_the_sum_are_both_right_and_leave_its_weight_alone(kind, size):
    model = nn.ModuleDict({"layer": kind(8, size)}).eval()
    inject(model, LoRAConfig(r=2, target_modules=["layer"]))
    randomise_(model, 0.5)
    layer, found = model["layer"], {}
    inputs = {"first": torch.randn(3, 8), "second": torch.randn(3, 8)}
    expected = {name: layer(x).detach() for name, x in inputs.items()}
    parameters, before = dict(layer.named_parameters()), state_bits(layer)
    layer.meet = meeting = Meeting()

    def run(name: str) -> None:
        found[name] = layer(inputs[name]).detach()
        meeting.first_left.set()

    threads = [threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    left = dict(layer.named_parameters())
    assert {name for name in parameters if left.get(name) is not parameters[name]} == set()
    assert state_bits(layer) == before
    layer.meet = lambda: None
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted)
        assert torch.equal(layer(inputs[name]).detach(), wanted)
