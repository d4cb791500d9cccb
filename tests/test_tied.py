"""A weight with two owners is never changed under the other; its layer stays factored, and gives the right outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import bits, randomise_, tokens, trace
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unmerge,
)


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


@pytest.mark.parametrize("targets", [["out", "mid"], ["embed", "mid"], ["embed", "out", "mid"]])
@pytest.mark.parametrize("tie", ["before", "after", "view"])
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


def test_a_model_with_nothing_but_tied_layers_counts_as_merged():
    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["out"]))
    before = trace(model)
    with merged(model):
        assert is_merged(model)
    assert not is_merged(model)
    assert trace(model) == before


@pytest.mark.parametrize("out", [merged_state_dict, merge_and_unload])
def test_merged_weights_that_could_not_express_the_adapter_are_refused_whenever_the_tie_was_made(out):
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


def test_the_remedy_of_untying_works():
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


def test_merging_a_part_does_not_forget_an_owner_outside_it():
    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["out"]))
    randomise_(model)
    plain = weights(model)
    merge(nn.Sequential(model.out))
    assert weights(model) == plain
