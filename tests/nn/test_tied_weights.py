"""Weights with two owners, tied or shared in another way, and weights that are computed from others.

Such a weight is never changed; its layer stays factored, and gives the right outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
    unmerge,
)
from support.models.networks import bits, randomise_, tokens


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mid(self.embed(x)).mean(1))


def reference(model: Any) -> torch.Tensor:
    """W + s * B @ A for each layer that is adapted, by hand in float64."""

    def weight(layer: Any) -> torch.Tensor:
        total = layer.weight.double()
        if not hasattr(layer, "lora_A"):
            return total
        product = layer.lora_B.double() @ layer.lora_A.double() * layer.lora.spec.scaling
        return total + (product.T if isinstance(layer, nn.Embedding) else product)

    x = F.linear(weight(model.embed)[tokens()], weight(model.mid), model.mid.bias.double())
    return F.linear(x.mean(1), weight(model.out))


@pytest.mark.parametrize(
    ("targets", "tie"), [(["out", "mid"], "before"), (["embed", "mid"], "view"), (["embed", "out", "mid"], "after")]
)
def test_a_tied_weight_is_never_changed_and_its_layer_stays_factored(targets, tie):
    model = Tied()
    if tie == "after":
        model.out = nn.Linear(8, 11, bias=False)
    if tie == "view":
        model.out.weight = nn.Parameter(model.embed.weight.detach()[:])
    inject(model, LoRAConfig(r=2, target_modules=targets))
    randomise_(model, 0.5)
    if tie == "after":
        model.out.weight = model.embed.weight
    plain, expected = weights(model), reference(model)
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-5, atol=1e-5)
    for _ in range(2):
        merge(model)
        assert is_merged(model)
        assert {n for n, b in weights(model).items() if b != plain[n]} == {"mid.weight"}
        torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-5, atol=1e-5)
        unmerge(model)
        assert not is_merged(model)
        assert weights(model) == plain
    with disable_adapter(model), merged(model):
        assert weights(model) == plain


@pytest.mark.parametrize("out", [merged_state_dict, merge_and_unload])
def test_merged_weights_of_a_tied_layer_are_refused_whenever_the_tie_was_made(out):
    before, after = Tied(), Tied()
    after.out = nn.Linear(8, 11, bias=False)
    for model in (before, after):
        inject(model, LoRAConfig(r=2, target_modules=["out"]))
        randomise_(model)
    after.out.weight = after.embed.weight
    for model in (before, after):
        plain = weights(model)
        with pytest.raises(LoRAError, match=r"'out': its weight is also embed\.weight.*untie the weight"):
            out(model)
        assert weights(model) == plain
        with merged(model), pytest.raises(LoRAError, match="'out': its weight is also"):
            out(model)


def test_untying_makes_merging_work():
    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["out"]))
    randomise_(model)
    expected = reference(model)
    with merged(model):
        pass
    model.out.weight = nn.Parameter(model.out.weight.detach().clone(), requires_grad=False)
    plain = weights(model)
    assert bits(merged_state_dict(model)["out.weight"]) != plain["out.weight"]
    with merged(model):
        assert weights(model)["out.weight"] != plain["out.weight"]
        torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-5, atol=1e-5)
    merge_and_unload(model)
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_was_untied_while_merged_is_merged_when_adapters_are_taken_out():
    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["out", "mid"]))
    randomise_(model)
    expected = reference(model)
    merge(model)
    model.out.weight = nn.Parameter(model.out.weight.detach().clone(), requires_grad=False)
    merge_and_unload(model)
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-5, atol=1e-5)


def test_merging_a_part_does_not_forget_an_owner_outside_it():
    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["out"]))
    randomise_(model)
    plain = weights(model)
    merge(nn.Sequential(model.out))
    assert weights(model) == plain


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_" not in name}


def test_module_under_two_names_is_adapted_and_merged_once():
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
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
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


@pytest.mark.parametrize("how", ["weight_norm", "old spectral_norm", "pruned"])
def test_a_weight_that_is_computed_since_injection_stays_factored_and_is_an_error_under_a_custom_forward(how):
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
    model = nn.Sequential(Activated(8, 8)).eval()
    inject(model, LoRAConfig(r=2))
    COMPUTED[how](model[0])
    with pytest.raises(LoRAError, match=r"since injection, weight is computed from other parameters .*; undo that"):
        model(x)
