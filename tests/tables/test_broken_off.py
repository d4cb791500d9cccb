"""Each function that changes a model, broken off before any line: the change is done or not, and can be done then.

Every day at some lines, in the slow tests at many, and with LORA_FULL=1 in the environment at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    attach,
    detach,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import Listing
from lightning_lora.model.merging import holds_merged
from support.runs.broken_off import break_off

X = torch.tensor([[1, 2, 3], [4, 5, 6]])
STEPS = [997, pytest.param(1 if os.environ.get("LORA_FULL") else 61, marks=pytest.mark.slow)]


class Model(nn.Module):
    """With a layer, an attention, a parameter, trained rows and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(self.table(x)) @ self.mix
        result: torch.Tensor = self.head(self.attention(x, x, x)[0])
        return result


def trained(seed: int = 1, **options: Any) -> Model:
    given: dict[str, Any] = {
        "target_modules": ["fc", "attention"],
        "target_parameters": ["mix"],
        "modules_to_save": ["head"],
        "trainable_token_indices": {"table": [1, 2]},
    }
    inject(model := Model(), LoRAConfig(r=2, init_lora_weights=False, **given | options), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * seed
    return model


BESIDE: dict[str, Any] = {"modules_to_save": None, "trainable_token_indices": None}


@cache
def adapter(kind: str) -> Any:
    options: dict[str, dict[str, Any]] = {
        "same shape": {},
        "other rank": {"rank_pattern": {"fc": 3}},
        "DoRA": {**BESIDE, "target_modules": ["fc"], "target_parameters": None, "use_dora": True},
        "beside": BESIDE,
    }
    return take_adapter(trained(2, **options[kind]))


def merged(model: Model) -> Model:
    merge(model)
    return model


def with_adapters(model: Model) -> Model:
    for name in ("x", "y"):
        attach(model, adapter("beside"), name=name, strength=0.5)
    return model


STATES: dict[str, Callable[[], Model]] = {
    "plain": Model,
    "injected": trained,
    "merged": lambda: merged(trained()),
    "with two attached": lambda: with_adapters(trained(**BESIDE)),
    "with two attached, merged": lambda: merged(with_adapters(trained(**BESIDE))),
    "two attached alone, merged": lambda: merged(with_adapters(Model())),
}


def block(opened: Callable[[], Any]) -> None:
    with opened():
        pass


CALLS: dict[str, Callable[[Model], Any]] = {
    "inject": lambda model: inject(model, LoRAConfig(r=2, init_lora_weights=False), seed=3),
    "load_adapter": lambda model: load_adapter(model, adapter("same shape")),
    "load_adapter, of another rank": lambda model: load_adapter(model, adapter("other rank")),
    "load_adapter, DoRA": lambda model: load_adapter(model, adapter("DoRA")),
    "merge": merge,
    "unmerge": unmerge,
    "disable_adapter": lambda model: block(lambda: disable_adapter(model)),
    "scaled": lambda model: block(lambda: scaled(model, 0.0)),
    "attach": lambda model: attach(model, adapter("beside"), name="z"),
    "detach": lambda model: detach(model, "x"),
    "set_strength": lambda model: set_strength(model, 2.0, "y"),
    "unload": unload,
    "merge_and_unload": merge_and_unload,
}
ROWS = [
    ("inject", "plain"),
    ("inject", "two attached alone, merged"),
    *((call, "plain") for call in CALLS if call.startswith("load")),
    *((call, "merged") for call in CALLS if call.startswith("load")),
    ("load_adapter, of another rank", "with two attached, merged"),
    ("merge", "with two attached"),
    ("unmerge", "with two attached, merged"),
    *((call, "merged") for call in ("disable_adapter", "scaled", "unload", "merge_and_unload")),
    *((call, "with two attached") for call in ("unload", "merge_and_unload")),
    ("attach", "plain"),
    ("attach", "injected"),
    *((call, "with two attached, merged") for call in ("attach", "detach", "set_strength")),
    *((call, "two attached alone, merged") for call in ("attach", "detach", "set_strength")),
]
BETWEEN = {"inject": [unmerge], "unload": [unmerge], "merge_and_unload": [unmerge, merge]}  # which are done first
# A second call after the first is an error, or nothing.
ENDS = {"inject", "attach", "detach", "unload", "merge_and_unload"}


def shown(model: Model) -> Any:
    """What a model computes, what its state dict holds, what is trained, and whether it is merged."""
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    classes = [type(module) for module in model.modules()]
    return model(X).tolist(), state, flags, classes, holds_merged(Listing(model))


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # a generator that was broken off
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("call", "state"), ROWS)
def test_a_call_broken_off_is_done_or_not_and_can_be_done_then(call: str, state: str, step: int):
    before = shown(STATES[state]())
    CALLS[call](model := STATES[state]())
    after = shown(model)
    allowed = [before, after]
    for change in BETWEEN.get(call, []):
        with suppress(LoRAError):  # a plain model is neither
            change(model := STATES[state]())
            allowed.append(shown(model))
    for line in range(step // 2, 1_000_000, step):
        model = STATES[state]()
        reached = break_off(lambda model=model: CALLS[call](model), line)
        found = shown(model)
        assert found in allowed, line
        with suppress(LoRAError) if call in ENDS and found == after else nullcontext():
            CALLS[call](model)
        assert shown(model) == after, line
        if not reached:
            assert line >= step
            return
