"""Linear layers with torchao's NF4Tensor: scales in groups that ranks can share, casts, copies, moves, memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    quantize_base,
    summary,
    unload,
)
from lightning_lora.nn.nf4 import group_size
from lightning_lora.nn.quantized import dequantize, quantized_as
from support.covering import covering
from support.models.pair_checks import by_pickle
from support.models.quantized import NF4, inputs, network, packed_bits, quantized, values_of

torchao = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize(
    ("scales", "size"), [(4096 * 4096 // 64, 256), (64 * 128, 128), (256, 4), (32, 4), (6, 2), (5, 1)]
)
def test_scales_are_quantized_in_groups_that_64_ranks_can_share(scales, size):
    assert group_size(scales) == size


def test_weights_of_few_blocks_keep_their_values_nearly():
    model = nn.Sequential(*(nn.Linear(64, scales) for scales in (1, 5, 6)))
    weights = [layer.weight.detach().clone() for layer in model]
    quantize_base(model)
    for layer, weight in zip(model, weights, strict=True):
        assert float((dequantize(layer) - weight).norm() / weight.norm()) < 0.15


@pytest.mark.parametrize(("adapt", "dtype"), covering([False, True], [torch.float64, torch.bfloat16], meet=1))
def test_a_cast_leaves_the_weights_quantized_with_their_bits(adapt, dtype):
    """torchao's own tensor is dequantized by a cast of its layer, even to the dtype that it has."""
    model = quantized(NF4)
    bits = packed_bits(model)
    if adapt:
        inject(model, LoRAConfig(r=2))
    model.to(dtype)
    assert packed_bits(model) == bits
    assert model[0].bias.dtype == dtype
    output = model(inputs(dtype=dtype))
    assert output.dtype == dtype
    expected = quantized(NF4)(inputs()).detach()
    assert float((output.detach().float() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("adapt", [False, True], ids=["plain", "adapted"])
def test_a_copy_has_the_bits_and_a_life_of_its_own(adapt):
    """torchao's own tensor is quantized again when it is copied, in groups of another size."""
    model = quantized(NF4)
    if adapt:
        inject(model, LoRAConfig(r=2, init_lora_weights=False))
    x = inputs()
    for copied in (copy.deepcopy, copy.copy, by_pickle):
        layer = copied(model[0])
        assert type(layer) is type(model[0])
        assert torch.equal(layer(x), model[0](x))
        assert quantized_as(layer.weight) == NF4
        assert layer.weight.requires_grad is False
        memory = [one.weight.quantized_data.data_ptr() for one in (layer, model[0])]
        assert (memory[0] == memory[1]) == (copied is copy.copy)


def test_a_move_moves_every_part():
    model = quantized(NF4)
    model.to("meta")
    weight: Any = model[0].weight
    assert {weight.device.type, weight.quantized_data.device.type, weight.nf4.device.type} == {"meta"}
    assert quantized_as(weight) == NF4


def test_a_weight_that_torchao_quantized_itself_is_adapted_and_unloaded():
    model = network()
    for position in (0, 2, 4):
        weight = torchao.to_nf4(model[position].weight.detach(), 64, 4)
        model[position].weight = nn.Parameter(weight, requires_grad=False)
    assert inject(model, LoRAConfig(r=2)) == ["0", "2", "4"]
    assert summary(model).quantized == {NF4: 3}
    model(inputs()).sum().backward()
    unload(model)
    assert type(model[0]) is nn.Linear


def test_the_memory_is_a_seventh_of_float32():
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    quantize_base(model)
    weight: Any = model[0].weight
    held = sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
    assert held * 8 / weight.numel() == pytest.approx(4.13, abs=0.01)
    assert values_of(model[0]).shape == (512, 512)
