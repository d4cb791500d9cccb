"""Changes to a weight while it is merged: allowed ones, and edits, after which unmerge names the layer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, is_merged, merge, merged, unmerge
from support.covering import covering
from support.models.networks import bits, randomise_, state_bits

pytestmark = pytest.mark.core


def stack(seed: int = 1, width: int = 24) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    return model


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load": lambda model: model.load_state_dict(stack(2).state_dict()),
    "load and assign": lambda model: model.load_state_dict(stack(2).state_dict(), assign=True),
    "load what it holds": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "half": lambda model: model.half(),
    "to float64": lambda model: model.to(torch.float64),
    "to the device that it is on": lambda model: model.to("cpu"),
    "another base": lambda model: model.load_state_dict(
        {name: value for name, value in stack(3).state_dict().items() if "lora_" not in name}
    ),
}


@pytest.mark.parametrize(("change", "budget"), covering([*CHANGES], [2**26, 0], meet=1))
def test_unmerge_after_an_allowed_change_gives_what_the_change_makes_of_an_unmerged_model(
    monkeypatch, change: str, budget: int
):
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", budget)
    model, twin = stack(), stack()
    merge(model)
    for changed in (model, twin):
        CHANGES[change](changed)
    assert is_merged(model)
    unmerge(model)
    assert state_bits(model) == state_bits(twin)


EDITS: dict[str, Callable[[nn.Linear], Any]] = {
    "every value": lambda layer: layer.weight.data.add_(0.5),
    "one value": lambda layer: layer.weight.data[3, 4].mul_(2),
    "initialised anew": lambda layer: nn.init.zeros_(layer.weight),
    "an optimizer's step": lambda layer: torch.optim.SGD([layer.weight], lr=1.0).step(),
}


def test_an_edit_outside_of_the_trained_rows_is_not_said_to_be_undone():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    inject(model, LoRAConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 3]}))
    randomise_(model)
    merge(model)
    model[0].weight.data[7] += 1
    with pytest.raises(LoRAError, match=r"layer '0'.*not bit for bit.*Load the base weights again"):
        unmerge(model)
    assert torch.equal((model[0].weight != before).any(1), torch.arange(10) == 7)


def test_a_lost_base_stays_refused_until_a_load_that_has_its_shape():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    base = copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 3]}))
    randomise_(model)
    merge(model)
    model[0].weight.data[7] += 1
    with pytest.raises(LoRAError, match="Load the base weights again"):
        unmerge(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False)
    with pytest.raises(LoRAError, match="could not be restored after merging"):
        model.state_dict()
    model.load_state_dict(base, strict=False)
    assert torch.equal(model.state_dict()["0.weight"], base["0.weight"])


@pytest.mark.parametrize(("edit", "budget", "way"), covering([*EDITS], [2**26, 0], ["unmerge", "merged"], meet=1))
def test_unmerge_after_an_edit_of_a_merged_weight_raises_and_names_the_layer(
    monkeypatch, edit: str, budget: int, way: str
):
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", budget)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    plain = copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    before = state_bits(model)
    model[1].weight.grad = torch.ones_like(model[1].weight)

    def edit_and_unmerge() -> None:
        if way == "unmerge":
            merge(model)
            EDITS[edit](model[1])
            unmerge(model)
        else:
            with merged(model):
                EDITS[edit](model[1])

    with pytest.raises(LoRAError, match=r"layer '1'.*changed while it was\s+merged"):
        edit_and_unmerge()
    assert not is_merged(model)
    if not budget:  # with a copy the weight is as it was
        with pytest.raises(LoRAError, match="could not be restored"):
            model.state_dict()
    for place in (0, 2):
        assert bits(model[place].weight) == bits(plain[f"{place}.weight"])
    model.load_state_dict(plain)  # the way out that the message gives
    assert state_bits(model) == before
    with merged(model):
        pass
    assert state_bits(model) == before
