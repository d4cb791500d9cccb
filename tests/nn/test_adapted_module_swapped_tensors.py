"""torch.utils.swap_tensors on adapted layers: by model.to() and load_state_dict() under torch's flag, and by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError, disable_adapter, inject, is_merged, merge, unmerge
from support.covering import covering
from support.models.networks import Zoo, state_bits, tokens, train, zoo_config

MODULES = ["conv", "body.0", "body.3"]
OPTIONS: dict[str, dict[str, Any]] = {
    "embeddings and modules_to_save": {},
    "dora": {"use_dora": True},
    "trained rows": {"trainable_token_indices": {"embed": [2, 5]}, "target_modules": MODULES},
}
STATES = ["injected", "merged"]


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def pair(options: str, state: str) -> tuple[Zoo, Zoo]:
    """A trained model in this state, and a copy of it."""
    torch.manual_seed(1)
    inject(model := Zoo(), zoo_config(**OPTIONS[options]))
    train(model)
    if state == "merged":
        merge(model.eval())
    return model.eval(), copy.deepcopy(model)


def converted_without_swaps(model: nn.Module, dtype: torch.dtype) -> None:
    torch.__future__.set_swap_module_params_on_conversion(False)
    model.to(dtype)
    torch.__future__.set_swap_module_params_on_conversion(True)


@torch.no_grad()
def assert_equal(model: nn.Module, other: nn.Module) -> None:
    """Equal outputs and bits, merged and not; merging leaves the bits."""
    assert is_merged(model) == is_merged(other)
    assert torch.equal(model(tokens()), other(tokens()))
    before = state_bits(model)
    assert before == state_bits(other)
    for act in (unmerge, merge, unmerge):
        act(model)
        act(other)
        assert torch.equal(model(tokens()), other(tokens()))
        assert state_bits(model) == before
    with disable_adapter(model), disable_adapter(other):
        assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize(
    ("options", "state", "dtype"), covering([*OPTIONS], [*STATES], [torch.float64, torch.float16], meet=1)
)
def test_a_cast_that_swaps_is_the_cast_that_does_not(options: str, state: str, dtype: torch.dtype):
    model, other = pair(options, state)
    parameters = list(model.parameters())
    converted_without_swaps(other, dtype)
    model.to(dtype)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert_equal(model, other)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize(("options", "state", "assign"), covering([*OPTIONS], [*STATES], [False, True], meet=1))
def test_a_load_that_swaps_gives_the_values_of_the_state_dict(options: str, state: str, assign: bool):
    (model, other), source = pair(options, state), pair(options, "injected")[0]
    train(source.requires_grad_(), 1)
    for each in (model, other):
        torch.__future__.set_swap_module_params_on_conversion(each is model)
        each.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert state_bits(model) == state_bits(source)
    assert_equal(model, other)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_weight_swapped_by_hand_is_the_new_base_and_refused_by_name_while_merged(options: str):
    model, other = pair(options, "injected")
    for name in ("embed", *MODULES):
        new = torch.randn_like(weight := model.get_submodule(name).weight)
        other.get_submodule(name).weight.data.copy_(new)
        torch.utils.swap_tensors(weight, nn.Parameter(new, requires_grad=weight.requires_grad))
    assert_equal(model, other)
    merge(model)
    torch.utils.swap_tensors(model.conv.weight, nn.Parameter(torch.randn(8, 8, 3), requires_grad=False))
    with pytest.raises(LoRAError, match="'conv': the weight was changed while it was merged"):
        unmerge(model)
