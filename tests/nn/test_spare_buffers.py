"""The memory of plain copies is reused from one merge to the next, and values never get mixed up."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, merge, unmerge
from lightning_lora.nn.adapted_weights import adapted_layers


def model(width: int = 64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    inject(net, LoRAConfig(r=2))
    for layer in adapted_layers(net).values():
        nn.init.normal_(layer.lora_B)
    return net


def copies(net: nn.Module) -> set[int]:
    return {kept.copy.data_ptr() for layer in adapted_layers(net).values() for kept in layer.lora.records.values()}


def held(net: nn.Module) -> int:
    """Bytes of memory that waits for the next merge."""
    return sum(spare.nbytes for layer in adapted_layers(net).values() for spare in layer.lora.spares.values())


def test_the_next_merge_takes_the_same_memory():
    net = model()
    before = [layer.weight.clone() for layer in adapted_layers(net).values()]
    merge(net)
    first = copies(net)
    unmerge(net)
    assert held(net) == 2 * 64 * 64 * 4
    merge(net)
    assert copies(net) == first
    assert len(first) == 2
    assert held(net) == 0
    unmerge(net)
    for weight, layer in zip(before, adapted_layers(net).values(), strict=True):
        assert torch.equal(weight, layer.weight)


def test_two_models_never_share_a_copy():
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


def test_spare_buffers_never_exceed_their_budget(monkeypatch):
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", 64 * 64 * 4 + 1)
    net = model()
    merge(net)
    unmerge(net)
    assert held(net) == 64 * 64 * 4


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_made_in_inference_mode_and_one_that_was_not(first):
    net = model()
    before, memory = net[0].weight.clone(), set()
    for inference in (first, not first):
        with torch.inference_mode(inference):
            net[0].weight = nn.Parameter(before.clone(), requires_grad=False)
        merge(net)
        memory |= copies(net)
        unmerge(net)
        assert torch.equal(before, net[0].weight)
    assert len(memory) == 3  # one for the other layer, and none of another mode is taken


def test_plain_copy_in_a_spare_buffer_keeps_the_strides():
    turned = model()
    merge(turned)
    unmerge(turned)
    turned[0].weight = nn.Parameter(turned[0].weight.detach().t().contiguous().t(), requires_grad=False)
    merge(turned)
    assert turned[0].lora.records["weight"].copy.stride() == turned[0].weight.stride() == (1, 64)
    assert turned[1].lora.records["weight"].copy.stride() == (64, 1)


def test_merge_that_fails_in_the_last_block_restores_every_layer():
    """W' of the blocks before it was already written."""
    net = model(width=600)
    before = [layer.weight.clone() for layer in adapted_layers(net).values()]
    with torch.no_grad():
        net[1].lora_B[-1, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(LoRAError, match=r"'1'.*not finite"):
            merge(net)
        assert all(map(torch.equal, before, (layer.weight for layer in adapted_layers(net).values())))
