"""Embeddings, quantized layers and stacks of experts on a device that is not the CPU, pretended here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.adapted_module import swapped_class
from lightning_lora.nn.linear import LoRAQuantizedLinear
from support.devices.places import Count, count
from support.models.layers import make_subject


def test_a_padded_place_gives_the_factors_no_gradient_that_is_not_finite(device):
    subject = make_subject("embedding, padding", torch.float32)
    padding = subject.layer.padding_idx
    subject.model.to(device)
    output = subject.model(torch.tensor([1, padding, 2], device=device))
    g = torch.ones(output.shape)
    g[1] = torch.nan
    output.backward(g.to(device))
    for factor in (subject.layer.lora_A, subject.layer.lora_B):
        assert factor.grad.cpu().isfinite().all()
    assert not subject.layer.lora_A.grad.cpu()[:, padding].any()


class Packed(nn.Linear):
    """Stands for a layer with a quantized weight, for which this device has no kernels: a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def packed() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Packed(6, 6)).double()
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    model[0].__class__ = swapped_class(LoRAQuantizedLinear, Packed)
    model[0].lora.custom_forward = False
    return model


def test_quantized_layer_on_a_device_writes_its_product_into_the_bases_output(counted_device):
    x = torch.randn(4, 6, dtype=torch.float64).to(counted_device)
    frozen = nn.Sequential(Packed(6, 6)).double().requires_grad_(False).to(counted_device)
    added = step_of(packed().to(counted_device), x) - step_of(frozen, x)
    small = {"mul": 2, "clone": 1, "copy_": 1}  # by s; B and its gradient are transposed
    assert added.operators == {"mm": 5, "addmm_": 1, "add": 1, **small}  # the sum is of the gradients of x


def step_of(model: nn.Module, x: torch.Tensor) -> Count:
    x = x.detach().requires_grad_()
    return count(lambda: model(x).sum().backward())


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=experts, num_experts_per_tok=1)
        config._experts_implementation = "eager"
        self.experts = modeling_mixtral.MixtralExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter)
        self.register_buffer("chosen", torch.arange(experts)[:, None])
        self.register_buffer("weights", torch.ones(experts, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(x, self.chosen, self.weights)
        return result


@pytest.mark.transformers_5
def test_gradients_of_single_experts_are_joined_once(counted_device):
    """Indexing a stack gives each expert a gradient of the whole stack's size."""
    model = Experts(5)
    inject(model, LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    model.to(counted_device)
    found = step_of(model, torch.randn(5, 4).to(counted_device)).operators
    assert found["stack"] == 4  # of both factors of both stacks
    assert found["select_backward"] == 0
