"""Weights that are shared in other ways than by tying, and weights that are computed from others."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from plain import bits, randomise_
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    merged,
    merged_state_dict,
    unload,
)


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_" not in name}


def test_one_module_under_two_names():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    plain = copy.deepcopy(model)
    assert inject(model, LoRAConfig(r=2, lora_alpha=3)) == ["first.0"]
    randomise_(model, 0.5)
    layer = model["second"][0]
    expected = layer.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    before = bits(layer.weight)
    with merged(model):  # once, though it has two names
        torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=1e-6)
    assert bits(layer.weight) == before
    state = adapter_state_dict(model)
    assert list(state) == ["first.0.lora_A", "first.0.lora_B", "second.0.lora_A", "second.0.lora_B"]
    other = copy.deepcopy(plain)
    inject(other, LoRAConfig(r=2, lora_alpha=3))
    load_adapter(other, state)
    assert torch.equal(other["first"][0].lora_B, layer.lora_B)
    copies = merged_state_dict(model)
    plain.load_state_dict(copies)
    assert torch.equal(copies["first.0.weight"], copies["second.0.weight"])
    torch.testing.assert_close(plain["second"][0].weight.double(), expected, rtol=0, atol=1e-6)
    unload(model)
    assert type(shared) is nn.Linear


def test_parts_of_one_storage_are_tied_only_where_they_overlap():
    storage = torch.randn(24, 8)
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("whole", "low", "high", "apart")})
    model["whole"] = nn.Linear(8, 16, bias=False)
    for name, rows in (("whole", slice(16)), ("low", slice(8)), ("high", slice(8, 16)), ("apart", slice(16, 24))):
        model[name].weight = nn.Parameter(storage[rows])
    inject(model, LoRAConfig(r=2, target_modules=["low", "high", "apart"]))
    randomise_(model, 0.5)
    before = storage.clone()
    with merged(model):
        assert torch.equal(storage[:16], before[:16])
        assert not torch.equal(storage[16:], before[16:])
    assert torch.equal(storage, before)


def test_a_buffer_that_shares_memory_is_an_owner_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].register_buffer("mirror", model[0].weight.detach())
    inject(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    randomise_(model, 0.5)
    before, expected = bits(model[1].mirror), model(torch.ones(1, 8))
    with merged(model):
        assert bits(model[1].mirror) == before
        torch.testing.assert_close(model(torch.ones(1, 8)), expected)
    with pytest.raises(LoRAError, match=r"'0': its weight is also 1\.mirror"):
        merged_state_dict(model)


def test_a_shared_bias_ties_nothing():
    """As in transformers' BERT heads, which hold the decoder's bias once more."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    assert inject(model, LoRAConfig(r=2)) == ["0", "1"]
    randomise_(model, 0.5)
    before = base_bits(model)
    with merged(model):
        assert {name for name, value in base_bits(model).items() if value != before[name]} == {"0.weight", "1.weight"}
    assert merged_state_dict(model).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


# --- computed weights ---


def old(function):
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
            result: nn.Module = function(layer)
        return result

    return apply


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old(nn.utils.weight_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": old(nn.utils.spectral_norm),
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_is_refused_by_name_with_a_remedy_that_works(how):
    for wanted in ("all-linear", ["plain", "computed"]):
        layers = {"plain": nn.Linear(8, 8), "computed": COMPUTED[how](nn.Linear(8, 8))}
        model = nn.Sequential(OrderedDict(layers)).eval()
        expected = model(torch.ones(1, 8))
        with pytest.raises(
            LoRAError, match=r"inject: 'computed': the weight of the .* is computed from others"
        ) as caught:
            inject(model, LoRAConfig(target_modules=wanted))
        assert torch.equal(model(torch.ones(1, 8)), expected)
        assert "exclude_modules=['computed']" in str(caught.value)
        assert inject(model, LoRAConfig(target_modules=wanted, exclude_modules=["computed"])) == ["plain"]


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_since_injection_stays_factored(how):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.ones(1, 8)
    inject(model, LoRAConfig(r=2))
    randomise_(model, 0.5)
    COMPUTED[how](model[1])
    expected = model.eval()(x)
    with merged(model):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(LoRAError, match="'1': its weight is computed from others"):
        merged_state_dict(model)


@pytest.mark.parametrize("how", COMPUTED)
def test_where_only_the_sum_would_be_right_a_weight_computed_since_injection_is_an_error(how):
    model = nn.Sequential(Activated(8, 8)).eval()
    inject(model, LoRAConfig(r=2))
    COMPUTED[how](model[0])
    with pytest.raises(LoRAError, match="weight is computed from others since injection; undo that"):
        model(torch.ones(1, 8))
