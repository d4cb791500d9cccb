"""An exception at any point of merge, unmerge, merged or disable_adapter leaves the base's bits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, disable_adapter, inject, is_merged, merge, merged, unmerge
from lightning_lora.nn.adapted_module import adapted_layers
from support.covering import covering
from support.models.networks import bits, randomise_
from support.runs.broken_off import break_off

MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 24), nn.Linear(24, 24), nn.Linear(24, 20, bias=False)
        self.head.weight = self.embed.weight


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.Conv1d(24, 24, 3))


VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora": (stack, {"target_modules": ["0", "1"]}),
    "dora": (stack, {"target_modules": ["0", "1"], "use_dora": True}),
    "start": (lambda: nn.Sequential(nn.Linear(24, 40)), {"init_lora_weights": "pissa"}),
    "rows": (lambda: nn.Sequential(nn.Embedding(60, 24), nn.Linear(24, 24)), {"trainable_token_indices": [3, 50]}),
    "parameters": (
        lambda: nn.Sequential(nn.LSTM(12, 12)),
        {"target_modules": [], "target_parameters": ["0.weight_ih_l0", "0.weight_hh_l0"]},
    ),
    "attention": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1), {}),
    "tied": (Tied, {"target_modules": ["embed", "body"]}),
}


def adapted(variant: str, dtype: torch.dtype) -> nn.Module:
    make, options = VARIANTS[variant]
    model = make().to(dtype).eval()
    if options.get("trainable_token_indices"):
        options = {"trainable_token_indices": {"0": options["trainable_token_indices"]}, "target_modules": ["1"]}
    inject(model, LoRAConfig(r=2, **options))
    randomise_(model, 0.05)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """All that merging changes: the bits, which adapters are active, torch's fast paths."""
    layers = {name: (each.lora_active, each.lora.merged) for name, each in adapted_layers(model).items()}
    switches = {name: getattr(each, "use_nested_tensor", None) for name, each in model.named_modules()}
    activations = {name: getattr(each, "activation_relu_or_gelu", None) for name, each in model.named_modules()}
    return {**{name: bits(p) for name, p in model.named_parameters()}, **layers, "fast": [switches, activations]}


def enter(context: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def call(model: nn.Module) -> None:
        with context(model):
            pass

    return call


CALLS: dict[str, Callable[[nn.Module], None]] = {
    "merge": merge,
    "unmerge": unmerge,
    "merged": enter(merged),
    "disable_adapter": enter(disable_adapter),
}


def check_breaking_off(model: nn.Module, call: str, found_merged: bool, steps: Iterator[int]) -> int:
    """Break a call off before one line after the other, and look at the model after each; return how often."""
    plain = state(model)
    merge(model)
    whole = state(model)
    unmerge(model)
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    count = 0
    for line in steps:
        if found_merged:
            merge(model)
        reached = break_off(lambda: CALLS[call](model), line)
        assert state(model) == (whole if is_merged(model) else plain), line
        assert {number: signal.getsignal(number) for number in signal.Signals} == handlers
        assert not list(next(iter(adapted_layers(model).values())).lora.injection.claims.open)
        merge(model)
        assert state(model) == whole
        unmerge(model)
        assert state(model) == plain
        if not reached:
            return count
        count += 1
    return count


WAYS = [True, False]


@pytest.fixture(params=WAYS, ids=["copies", "values"])
def _copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)


def every(step: int, start: int = 0) -> Iterator[int]:
    return iter(range(start, 10**6, step))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.parametrize(
    ("variant", "dtype", "call"),
    [("lora", torch.bfloat16, "merged"), ("dora", torch.float32, "merge"), ("dora", torch.bfloat16, "unmerge")],
)
def test_a_call_broken_off_anywhere_leaves_all_of_w_or_all_of_w_prime(monkeypatch, variant, dtype, call):
    monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)
    assert check_breaking_off(adapted(variant, dtype), call, call == "unmerge", every(61)) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks", "_copies")
@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.parametrize(
    ("variant", "call", "dtype", "_copies"),
    covering([*VARIANTS], [*CALLS], [torch.float32, torch.bfloat16], WAYS, meet=1),
    indirect=["_copies"],
)
def test_a_call_broken_off_at_many_lines_leaves_all_of_w_or_all_of_w_prime(variant, dtype, call):
    """At every fifth one, each variant from another; LORA_LINES=1 in the environment takes every one, half an hour."""
    model, step = adapted(variant, dtype), int(os.environ.get("LORA_LINES", "5"))
    lines = list(VARIANTS).index(variant) % step
    for found_merged in (False, True) if call in ("merged", "disable_adapter") else (call == "unmerge",):
        assert check_breaking_off(model, call, found_merged, every(step, lines)) > 100 / step


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("step", [61, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [0, 2**26])
def test_a_merge_that_fails_and_is_broken_off_while_it_takes_that_back_is_completed_by_unmerge(
    monkeypatch, budget, step
):
    monkeypatch.setattr(MERGE, "COPY_BUDGET", budget)
    model = adapted("lora", torch.float32)
    with torch.no_grad():
        model[1].lora_B[0] = float("nan")
    plain, count = state(model), 0
    for line in every(step):
        with suppress(LoRAError):
            if not break_off(lambda: merge(model), line):
                break
        unmerge(model)
        assert state(model) == plain, line
        count += 1
        if count * step > 3000:
            break
    assert count > 5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.filterwarnings("ignore:Exception ignored in")  # a generator that was broken off
@pytest.mark.parametrize("step", [97, pytest.param(11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", [merge, unmerge])
def test_a_call_broken_off_twice_is_completed_by_the_next_one(monkeypatch, call, step):
    monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)
    model = adapted("dora", torch.bfloat16)
    plain, weights = state(model), [bits(layer.weight) for layer in model]
    twice = 0
    for line in every(step):
        for later in (None, 1, 60):
            if call is unmerge:
                merge(model)
            reached = break_off(lambda: call(model), *((line,) if later is None else (line, line + later)))
            if later is None and not reached:
                assert twice > 5
                return
            twice += reached and later is not None
            with disable_adapter(model):
                assert [bits(layer.weight) for layer in model] == weights
            unmerge(model)
            assert state(model) == plain, (line, later)
