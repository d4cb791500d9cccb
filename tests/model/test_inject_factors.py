"""What injection makes: first values of the factors, and their dtype through later casts."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from support.models.networks import Zoo, bits, randomise_, tokens, zoo_config

# --- first values ---


@pytest.mark.parametrize(("parts", "pattern"), [(None, True), ([True, False, True], False), ([True, True, True], True)])
def test_gaussian_factors_of_each_part_have_a_deviation_of_one_over_its_rank(parts: Any, pattern: bool):
    """Not of the rows of A, of which there are as many as parts times r."""
    rank = 4 if pattern else 16
    model = nn.ModuleDict({"qkv": nn.Linear(4000, 30), "other": nn.Linear(4000, 30)})
    enable = {"qkv": parts} if parts else None
    ranks = {"qkv": rank} if pattern else None
    inject(model, LoRAConfig(r=16, rank_pattern=ranks, enable_lora=enable, init_lora_weights="gaussian"))
    a, b = model["qkv"].lora_A.detach(), model["qkv"].lora_B.detach()
    assert a.shape == (rank * sum(parts or [True]), 4000)
    for part in a.split(rank):
        deviation, spread = float(part.std()), 1 / math.sqrt(2 * part.numel())
        assert deviation * rank == pytest.approx(1, abs=5 * spread)
        assert float(part.mean()) * rank == pytest.approx(0, abs=5 / math.sqrt(part.numel()))
    assert not b.any()
    assert float(model["other"].lora_A.detach().std()) * 16 == pytest.approx(1, abs=0.02)


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A of a layer, as it has always been drawn from the random stream's state and the layer's name."""
    state = hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()
    seed = int.from_bytes(hashlib.sha256(f"{state}{name}".encode()).digest()[:8], "big") >> 1
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))


def test_without_a_seed_the_state_of_the_random_stream_and_the_layers_name_give_the_factors():
    torch.manual_seed(11)
    model = nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(6, 4)})
    expected = {name: drawn(name, (2, 6)) for name in model}
    inject(model, LoRAConfig(r=2))
    for name, layer in model.items():
        assert bits(layer.lora_A) == bits(expected[name])


# --- casts after a backward pass ---


def after_backward(**options: Any) -> Zoo:
    model = Zoo()
    inject(model, zoo_config(**options))
    randomise_(model)
    model(tokens()).square().mean().backward()
    return model


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def test_factors_and_their_gradients_stay_in_float32_where_a_model_is_cast_after_backward():
    model = after_backward()
    before = {name: (bits(p), bits(p.grad)) for name, p in factors(model).items()}
    model.bfloat16()
    for name, parameter in factors(model).items():
        assert (parameter.dtype, parameter.grad.dtype) == (torch.float32, torch.float32), name
        assert (bits(parameter), bits(parameter.grad)) == before[name], name
    others = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in others if parameter.grad is not None} == {torch.bfloat16}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.parametrize(("dtype", "asked"), [(torch.float16, True), (torch.float64, False)])
def test_factors_and_their_gradients_follow_a_cast_where_they_are_asked_to_or_it_is_wider(dtype: Any, asked: bool):
    model = after_backward(autocast_adapter_dtype=not asked)
    before = {name: (bits(p.to(dtype)), bits(p.grad.to(dtype))) for name, p in factors(model).items()}
    model.to(dtype)
    for name, parameter in factors(model).items():
        assert (parameter.dtype, parameter.grad.dtype) == (dtype, dtype), name
        assert (bits(parameter), bits(parameter.grad)) == before[name], name
