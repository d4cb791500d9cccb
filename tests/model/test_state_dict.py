"""State dicts for saving: everything that training changes, and plain merged weights. The model is untouched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError, adapter_state_dict, inject, merge, merged, merged_state_dict
from lightning_lora.exchange import take
from lightning_lora.model.adapted_model import Listing, open_model
from lightning_lora.model.live_state import open_state
from lightning_lora.model.state_dict import merge_state_dict
from support.models.networks import (
    ZOO_LAYERS,
    base_zoo,
    bits,
    fingerprint,
    same,
    state_bits,
    tokens,
    trace,
    trained_zoo,
    zoo_config,
)

pytestmark = pytest.mark.core

FACTORS = [f"{layer}.{factor}" for layer in ZOO_LAYERS for factor in ("lora_A", "lora_B")]
BUFFERS = [f"body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any]) -> None:
    take.check_fingerprint(open_state(open_model(model, "test")), expected)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"modules_to_save": None, "bias": "none"}, []),
        ({}, ["conv.bias", "body.0.bias", "body.3.bias", "head.weight", "head.bias"]),
        (
            {"modules_to_save": None, "bias": "all"},
            ["conv.bias", "norm.bias", "body.0.bias", "body.1.bias", "body.3.bias", "head.bias"],
        ),
    ],
)
def test_adapter_state_dict_is_all_that_training_changes(options, trained):
    model = trained_zoo(**options)
    state = adapter_state_dict(model)
    assert sorted(state) == sorted([*FACTORS, *BUFFERS, *trained])
    assert list(state) == [name for name in model.state_dict() if name in state]
    base = {name: bits(tensor) for name, tensor in base_zoo().state_dict().items()}
    now = state_bits(model)
    assert {name for name in base if base[name] != now[name]} <= state.keys()


@pytest.mark.parametrize("found", ["unmerged", "merged"])
def test_neither_state_dict_touches_the_model(found):
    model = trained_zoo()
    merge(model) if found == "merged" else None
    before = trace(model)
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in adapter_state_dict(model).items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == live[name].data_ptr()  # a view, no copy
    for name, tensor in merged_state_dict(model).items():
        assert not tensor.requires_grad
        assert (tensor.data_ptr() == live[name].data_ptr()) == (name.removesuffix(".weight") not in ZOO_LAYERS)
    assert trace(model) == before


def test_state_dicts_of_a_merged_model_equal_those_of_an_unmerged_one():
    model = trained_zoo()
    unmerged = [
        {name: bits(tensor) for name, tensor in view(model).items()}
        for view in (adapter_state_dict, merged_state_dict, lambda m: m.state_dict())
    ]
    with merged(model):
        assert unmerged == [
            {name: bits(tensor) for name, tensor in view(model).items()}
            for view in (adapter_state_dict, merged_state_dict, lambda m: m.state_dict())
        ]


def test_merged_state_dict_loads_into_a_plain_model_with_the_same_outputs():
    model, plain = trained_zoo(), base_zoo()
    state = merged_state_dict(model)
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    with merged(model):
        assert torch.equal(plain(tokens()), model(tokens()))
        for name in ZOO_LAYERS:
            assert same(state[f"{name}.weight"], model.get_submodule(name).weight.detach())


class Around(nn.Module):
    """A module around the injected one, with a trainable layer, a buffer and state of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.again = inner  # under a second name
        self.top = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.tensor(1.0), persistent=False)
        self.note = "first"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def test_names_are_relative_to_the_model_that_is_asked():
    model = Around(trained_zoo())
    inner = adapter_state_dict(model.inner)
    state = adapter_state_dict(model)
    around = {"top.weight", "top.bias", "count", "_extra_state"}
    assert state.keys() == around | {f"{path}.{name}" for path in ("inner", "again") for name in inner}
    assert state["_extra_state"] == {"note": "first"}
    weights = merged_state_dict(model)
    assert list(weights) == [name for name in model.state_dict() if "lora_" not in name]
    for name in ZOO_LAYERS:
        assert same(weights[f"inner.{name}.weight"], weights[f"again.{name}.weight"])
    other = Around(base_zoo())
    inject(other.inner, zoo_config())
    other.load_state_dict(model.state_dict())
    assert state_bits(other.inner) == state_bits(model.inner)


# --- which base ---


def test_fingerprint_covers_the_frozen_parameters_and_is_the_same_while_merged():
    model = trained_zoo()
    found = fingerprint(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert found.keys() == frozen
    with merged(model):
        assert fingerprint(model) == found
    assert len(json.dumps(found)) < 200 * len(found)


@pytest.mark.parametrize("found", ["unmerged", "merged"])
def test_fingerprint_accepts_the_same_base_and_names_a_changed_weight(found):
    model = trained_zoo()
    expected = fingerprint(model)
    merge(model) if found == "merged" else None
    check_fingerprint(model, expected)
    for name in ("embed.weight", "conv.weight", "norm.weight"):
        other = trained_zoo()
        with torch.no_grad():
            other.get_parameter(name).mul_(1.05)
        merge(other) if found == "merged" else None
        with pytest.raises(LoRAError, match=f"another base: values of '{name}' were"):
            check_fingerprint(other, expected)


@pytest.mark.parametrize("left_out", ["body.0.weight", "body.0.lora_B"])
def test_a_state_dict_without_what_an_adapter_is_merged_into_is_refused(left_out: str):
    """Merged weights of the rest would be another model, and nothing would say so."""
    model = trained_zoo()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(left_out)}
    with pytest.raises(LoRAError, match=r"merged weights: the state dict of Zoo leaves out 'body\.0\."):
        merge_state_dict(Listing(model), state)
