"""The plain LoRA that equals an adapter: the same change of each weight, out of A and B alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, merged_state_dict, take_adapter
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.adapter.lora_form import as_lora, padded
from lightning_lora.nn.lora import LoRA
from support.models.variants import define_gated, variants_forgotten


def build() -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = {"linear": nn.Linear(6, 5), "conv": nn.Conv2d(4, 6, 3), "grouped": nn.Conv1d(4, 6, 3, groups=2)}
        layers |= {"table": nn.Embedding(9, 6), "qkv": nn.Linear(6, 12), "lstm": nn.LSTM(4, 5), "head": nn.Linear(6, 3)}
        return nn.ModuleDict(layers).double()


def adapted(**options: Any) -> nn.Module:
    net = build()
    inject(net, LoRAConfig(r=2, lora_alpha=3, **options))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return net


def change(adapter: Adapter, layer: str) -> torch.Tensor:
    """s * B @ A, by the definition, for layers whose weights are not stored (in, out)."""
    a, b = (adapter.factor(layer, leaf).flatten(1) for leaf in ("lora_A", "lora_B"))
    product: torch.Tensor = adapter.scaling(layer) * (b @ a)
    return product


CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["linear", "conv", "grouped", "qkv"]},
    "PiSSA": {"target_modules": ["linear", "conv", "qkv"], "init_lora_weights": "pissa"},
    "LoHa": {"target_modules": ["linear", "conv", "grouped"], "variant": "loha"},
    "parts": {"target_modules": ["qkv"], "enable_lora": {"qkv": [True, False, True]}},
    "PiSSA of parts": {
        "target_modules": ["qkv"],
        "enable_lora": {"qkv": [False, True, False]},
        "init_lora_weights": "pissa",
    },
    "a parameter": {"target_modules": [], "target_parameters": ["weight_ih_l0"]},
    "PiSSA of a parameter": {
        "target_modules": [],
        "target_parameters": ["weight_ih_l0"],
        "init_lora_weights": "pissa",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_plain_lora_changes_each_weight_as_the_adapter_does(case: str):
    net = adapted(**CASES[case], modules_to_save=["head"])
    lora = as_lora(adapter := take_adapter(net))
    assert isinstance(lora.variant, LoRA)
    assert lora.layers.keys() == adapter.layers.keys()
    merged, base = merged_state_dict(net), build().state_dict()
    for layer in lora.layers:
        assert set(lora.own_names[layer]) == {"lora_A", "lora_B"}
        name = layer if layer in base else f"{layer}.weight"
        expected = merged[name] - base[name]
        torch.testing.assert_close(change(lora, layer).view_as(expected), expected, rtol=0, atol=1e-12)
    beside = lora.whole_tensors()
    assert beside.keys() == adapter.whole_tensors().keys() >= {"head.weight", "head.bias"}
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in beside.items())


def test_options_of_a_variant_of_the_users_own_are_left_behind():
    with variants_forgotten():
        define_gated(own_options={"gate": 1.0})
        net = adapted(target_modules=["linear"], variant="gated", variant_options={"gate": 2.0})
        lora = as_lora(adapter := take_adapter(net))
        assert adapter.config is not None
        assert lora.config is not None
        assert (lora.config.variant, lora.config.variant_options) == ("lora", None)
        expected = merged_state_dict(net)["linear.weight"] - build()["linear"].weight
        torch.testing.assert_close(change(lora, "linear"), expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_zeros_raise_the_rank_and_leave_the_product(kernel: tuple[int, ...]):
    left, right = torch.randn(5, 2, *[1] * len(kernel)), torch.randn(2, 4, *kernel)
    higher_left, higher_right = padded((left, right), 3)
    assert (higher_left.shape[:2], higher_right.shape[:2]) == ((5, 3), (3, 4))
    assert torch.equal(higher_left[:, 2:], torch.zeros_like(higher_left[:, 2:]))
    torch.testing.assert_close(higher_left.flatten(1) @ higher_right.flatten(1), left.flatten(1) @ right.flatten(1))
