"""The memory of plain copies is used again from one merge to the next, and no values get mixed up by that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, merge, unmerge
from lightning_lora.nn import exact_merge as scratch_module
from lightning_lora.nn.exact_merge import Spares
from lightning_lora.nn.lora_layer import adapted_layers


@pytest.fixture(autouse=True)
def spares(monkeypatch) -> Spares:
    own = Spares()
    monkeypatch.setattr("lightning_lora.nn.exact_merge.SPARES", own)
    return own


def model(width: int = 64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    inject(net, LoRAConfig(r=2))
    for layer in adapted_layers(net).values():
        nn.init.normal_(layer.lora_B)
    return net


def copies(net: nn.Module) -> set[int]:
    return {kept.copy.data_ptr() for layer in adapted_layers(net).values() for kept in layer.lora.records.values()}


def test_the_next_merge_takes_the_same_memory(spares):
    net = model()
    before = [layer.weight.clone() for layer in adapted_layers(net).values()]
    merge(net)
    first = copies(net)
    unmerge(net)
    assert spares.nbytes == 2 * 64 * 64 * 4
    merge(net)
    assert copies(net) == first
    assert len(first) == 2
    assert spares.nbytes == 0
    unmerge(net)
    for weight, layer in zip(before, adapted_layers(net).values(), strict=True):
        assert torch.equal(weight, layer.weight)


def test_two_models_never_share_a_copy(spares):
    one, two = model(), model(seed=1)
    before = [layer.weight.clone() for net in (one, two) for layer in adapted_layers(net).values()]
    for _ in range(2):
        merge(one)
        merge(two)
        assert not copies(one) & copies(two)
        unmerge(one)
        unmerge(two)
    after = [layer.weight for net in (one, two) for layer in adapted_layers(net).values()]
    assert all(map(torch.equal, before, after))


def test_no_more_than_the_budget_is_held(spares, monkeypatch):
    monkeypatch.setattr(scratch_module, "SPARE_BYTES", 64 * 64 * 4 + 1)
    net = model()
    merge(net)
    unmerge(net)
    assert spares.nbytes == 64 * 64 * 4 == sum(copy.nbytes for free in spares.free.values() for copy in free)


@pytest.mark.parametrize("first", [True, False])
def test_a_model_made_in_inference_mode_and_one_that_was_not(spares, first):
    for inference in (first, not first):
        with torch.inference_mode(inference):
            net = model()
        before = net[0].weight.clone()
        merge(net)
        unmerge(net)
        assert torch.equal(before, net[0].weight)
    assert len(spares.free) == 2


def test_strides_are_kept(spares):
    net = model()
    merge(net)
    unmerge(net)
    turned = model()
    turned[0].weight = nn.Parameter(turned[0].weight.detach().t().contiguous().t(), requires_grad=False)
    merge(turned)
    assert turned[0].lora.records["weight"].copy.stride() == turned[0].weight.stride() == (1, 64)
    assert turned[1].lora.records["weight"].copy.stride() == (64, 1)


def test_a_value_that_is_not_finite_in_the_last_block(spares):
    """W' of the blocks before it was already written."""
    net = model(width=600)
    before = [layer.weight.clone() for layer in adapted_layers(net).values()]
    with torch.no_grad():
        net[1].lora_B[-1, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(LoRAError, match=r"'1'.*not finite"):
            merge(net)
        assert all(map(torch.equal, before, (layer.weight for layer in adapted_layers(net).values())))
