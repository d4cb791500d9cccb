"""Two threads in a layer that computes with W': both are right, and the weight stays."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
)
from support.models import randomise_, state_bits


class Meeting:
    """Where two threads stand inside one layer's forward at a time: the second comes, the first leaves, it goes on.

    Each waits for a moment only, so that a layer which lets one thread in at a time passes too.
    """

    PATIENCE = 0.3

    def __init__(self) -> None:
        self.inside, self.both_inside, self.first_left = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> None:
        if threading.current_thread().name == "first":
            self.inside.set()
            self.both_inside.wait(self.PATIENCE)
        elif threading.current_thread().name == "second":
            self.both_inside.set()
            self.first_left.wait(self.PATIENCE)

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
        """What the two give."""
        results: list[Any] = [None, None]

        def keep(place: int, step: Callable[[], Any], done: threading.Event | None) -> None:
            try:
                results[place] = step()
            finally:
                if done is not None:
                    done.set()

        threads = [
            threading.Thread(target=keep, args=(0, first, self.first_left), name="first", daemon=True),
            threading.Thread(target=keep, args=(1, second, None), name="second", daemon=True),
        ]
        threads[0].start()
        assert self.inside.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        return results


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
@pytest.mark.parametrize(
    "build", [lambda: MeetingLinear(8, 8), lambda: MeetingAttention(8, 2)], ids=["linear", "attention"]
)
def test_two_threads_in_a_layer_that_runs_on_the_sum_are_both_right_and_leave_its_weight_alone(build):
    model = nn.ModuleDict({"layer": build()}).eval()
    inject(model, LoRAConfig(r=2, target_modules=["layer"]))
    randomise_(model, 0.5)
    layer = model["layer"]
    inputs = [torch.randn(3, 8), torch.randn(3, 8)]
    expected = [layer(x).detach() for x in inputs]
    parameters, before = dict(layer.named_parameters()), state_bits(layer)
    layer.meet = meeting = Meeting()
    found = meeting.run(*(functools.partial(layer, x) for x in inputs))
    left = dict(layer.named_parameters())
    assert {name for name in parameters if left.get(name) is not parameters[name]} == set()
    assert state_bits(layer) == before
    for output, wanted in zip(found, expected, strict=True):
        assert torch.equal(output.detach(), wanted)
    layer.meet = lambda: None
    assert all(torch.equal(layer(x).detach(), wanted) for x, wanted in zip(inputs, expected, strict=True))
