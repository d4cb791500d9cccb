"""The memory of plain copies is reused, and given back with the adapters."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    merge,
    unload,
    unmerge,
)
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import randomise_
from support.runs.shortcuts import let_collections_pass_over_what_is_there

WIDTH = 37


def one_layer(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    return model


def held() -> int:
    """Bytes of all tensors that are alive and no parameters."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.parametrize("end", ["unload", "forget"])
def test_the_memory_of_a_models_copies_is_given_back_when_its_adapters_are(end: str):
    let_collections_pass_over_what_is_there()  # held() sees what is made from here on, which is quicker
    empty = held()
    models = [one_layer(1), one_layer(2)]
    for _ in range(2):
        for model in models:
            merge(model)
        for model in models:
            unmerge(model)
    if end == "unload":
        for model in models:
            unload(model)
    del model
    models.clear()
    assert held() - empty < 1000


def copies(model: nn.Module) -> set[int]:
    undos = [undo for layer in adapted_layers(model).values() if (undo := layer.lora.undo) is not None]
    return {chunk.kept.data_ptr() for undo in undos for chunk in undo.chunks}


def test_two_models_never_share_the_memory_that_each_takes_again():
    one, two = one_layer(1), one_layer(2)
    before = [model[0].weight.clone() for model in (one, two)]
    taken = []
    for _ in range(2):
        merge(one)
        merge(two)
        taken.append((copies(one), copies(two)))
        unmerge(one)
        unmerge(two)
    assert taken[0] == taken[1]
    assert not taken[0][0] & taken[0][1]
    assert all(map(torch.equal, before, [model[0].weight for model in (one, two)]))
