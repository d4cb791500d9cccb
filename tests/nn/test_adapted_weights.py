"""An adapted layer between merging and unmerging: copies, state dicts, casts, edits."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError, is_merged, merge, unmerge
from support.covering import covering
from support.models.layers import DTYPES, Holder, Subject, fill_factors_, make_subject, same_bits

pytestmark = pytest.mark.core

KINDS = ["linear", "fused Conv1D", "embedding", "conv2d, groups", "conv that pads"]
WAYS = ["kept values", "plain copies"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are kept as plain copies; without a budget they are kept like large ones."""
    if request.param == "kept values":
        monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", 0)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def kept_subject(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    """With an adapter so small that values are kept, not whole blocks, and so large that 16 bits lose little of it."""
    subject = make_subject(name, dtype)
    fill_factors_(subject, 0.08)
    return subject


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("name", "copied", "found", "way"), covering(KINDS, [*COPIES], [merge, unmerge], WAYS, meet=1), indirect=["way"]
)
def test_copy_of_a_layer_is_equal_and_independent(name: str, copied: str, found: Callable[..., None]) -> None:
    subject = kept_subject(name)
    found(subject.model)
    wanted = subject.model(subject.x)
    twin = COPIES[copied](subject.model)
    assert type(twin.layer) is type(subject.layer)
    assert is_merged(twin) == is_merged(subject.model)
    assert torch.equal(twin(subject.x), wanted)
    with torch.no_grad():
        twin.layer.lora_B.zero_()
    unmerge(twin)
    assert same_bits(twin.layer.weight, subject.plain.layer.weight)
    assert torch.equal(subject.model(subject.x), wanted)
    unmerge(subject.model)
    assert same_bits(subject.layer.weight, subject.plain.layer.weight)
    assert torch.equal(twin(subject.x), subject.plain(subject.x))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("name", "dtype", "target", "way"),
    covering(KINDS, DTYPES, [*reversed(DTYPES)], WAYS, meet=1),
    indirect=["way"],
)
def test_casting_while_merged_equals_casting_and_then_merging(
    name: str, dtype: torch.dtype, target: torch.dtype
) -> None:
    subject = kept_subject(name, dtype)
    twin = copy.deepcopy(subject.model)
    merge(subject.model)
    subject.model.to(target)
    assert is_merged(subject.model)
    merge(twin.to(target))
    assert same_bits(subject.layer.weight, twin.layer.weight)
    unmerge(subject.model)
    assert same_bits(subject.layer.weight, subject.plain.layer.weight.to(target))


EDITS: dict[str, Callable[[Holder], Any]] = {
    "in place": lambda model: [p.data.mul_(-2) for p in (model.layer.lora_A, model.layer.lora_B)],
    "new data": lambda model: setattr(model.layer.lora_A, "data", torch.randn(model.layer.lora_A.shape)),
    "new parameter": lambda model: setattr(model.layer, "lora_B", nn.Parameter(torch.randn(model.layer.lora_B.shape))),
    "an optimizer": lambda model: torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.grad is not None]}], lr=1.0
    ).step(),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("name", "edit", "way"), covering(KINDS, [*EDITS], WAYS, meet=1), indirect=["way"])
def test_editing_the_factors_while_merged_cannot_touch_the_base(name: str, edit: str) -> None:
    subject = kept_subject(name)
    subject.model(subject.x).sum().backward()
    merge(subject.model)
    found = subject.layer.weight.clone()
    EDITS[edit](subject.model)
    assert same_bits(subject.layer.weight, found)
    assert same_bits(subject.model.state_dict()["layer.weight"], subject.plain.layer.weight)
    unmerge(subject.model)
    assert same_bits(subject.layer.weight, subject.plain.layer.weight)
    merge(subject.model)
    assert not same_bits(subject.layer.weight, found)  # the edit counts from now on


def test_a_damaged_layer_is_not_saved_until_its_base_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", 0)  # a copy would bring it back
    subject = kept_subject("linear")
    base = subject.plain.state_dict()
    merge(subject.model)
    with torch.no_grad():
        subject.layer.weight.add_(1)
    for _ in range(2):
        with pytest.raises(LoRAError, match="changed while it was merged"):
            subject.model.state_dict()
    with pytest.raises(LoRAError, match="layer 'layer'"):
        unmerge(subject.model)
    with pytest.raises(LoRAError, match="could not be restored"):
        subject.model.state_dict()
    subject.model.load_state_dict(base)
    assert same_bits(subject.model.state_dict()["layer.weight"], base["layer.weight"])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", ["cast", "load"])
def test_a_change_that_fails_while_merged_leaves_the_layer_merged_as_the_others_are(
    change: str,
) -> None:
    first, second = kept_subject("linear"), kept_subject("linear")
    model: Any = nn.Sequential(first.model, second.model)
    merge(model)
    layer = model[1].layer
    before = layer.weight.clone()

    def fail(*args: object) -> torch.Tensor:
        raise MemoryError

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return fail() if tensor is layer.weight else tensor.double()

    layer.register_load_state_dict_pre_hook(fail)
    state = model.state_dict()
    with pytest.raises(MemoryError):
        model._apply(convert) if change == "cast" else model.load_state_dict(state)
    assert layer.lora.merged
    assert not layer.lora_active
    assert same_bits(layer.weight, before)
    unmerge(model)
    assert same_bits(layer.weight, second.plain.layer.weight)


@pytest.mark.usefixtures("way")
def test_merging_a_merged_layer_again_changes_nothing() -> None:
    subject = kept_subject("linear")
    merge(subject.model)
    before = subject.layer.weight.clone()
    subject.layer.merge_(copy=False)
    assert same_bits(subject.layer.weight, before)
    unmerge(subject.model)
    assert same_bits(subject.layer.weight, subject.plain.layer.weight)
