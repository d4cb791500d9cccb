"""Initial values of A and B: the references' distributions, drawn without advancing the user's random stream."""

from __future__ import annotations

from typing import Any

import loralib
import peft
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from support.covering import covering
from support.models.networks import Zoo, randomise_, tokens, zoo_config
from support.models.variants import define_gated, variants_forgotten

R = 32
BUILDERS = {
    "linear": lambda: nn.Linear(300, 200),
    "conv": lambda: nn.Conv2d(40, 150, 3),
    "embedding": lambda: nn.Embedding(300, 200),
}


def ours(kind: str, init: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = nn.Sequential(BUILDERS[kind]())
    inject(model, LoRAConfig(r=R, target_modules=["0"], init_lora_weights=init))
    return model[0].lora_A.detach(), model[0].lora_B.detach()


def pefts(kind: str, init: Any) -> tuple[torch.Tensor, torch.Tensor]:
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=init)
    layer = peft.LoraModel(nn.Sequential(BUILDERS[kind]()), config, "default").model[0]
    if kind == "embedding":
        return layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def loralibs(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = {"linear": loralib.Linear, "embedding": loralib.Embedding}[kind](300, 200, r=R)
    return layer.lora_A.detach(), layer.lora_B.detach()


def assert_same_distribution(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A two-sample Kolmogorov-Smirnov test that equal distributions fail once in a million."""
    assert found.shape == expected.shape
    if not expected.any():
        assert not found.any()
        return
    one, other = found.flatten().sort().values, expected.flatten().sort().values
    points = torch.cat([one, other]).contiguous()
    shares = [torch.searchsorted(s.contiguous(), points, right=True) / len(s) for s in (one, other)]
    distance = (shares[0] - shares[1]).abs().max()
    assert distance < 2.69 * (2 / len(one)) ** 0.5


@pytest.mark.parametrize(
    ("kind", "init"),
    [(kind, init) for kind in BUILDERS for init in (True, "gaussian", False) if (kind, init) != ("embedding", False)],
)
def test_initial_factors_are_distributed_as_those_of_peft(kind, init):
    for found, expected in zip(ours(kind, init), pefts(kind, init), strict=True):
        assert_same_distribution(found, expected)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_default_init_is_distributed_as_that_of_loralib(kind):
    for found, expected in zip(ours(kind, True), loralibs(kind), strict=True):
        assert_same_distribution(found, expected)


@pytest.mark.parametrize("kind", BUILDERS)
def test_orthogonal_init_equals_that_of_peft_and_starts_without_effect(kind):
    found = ours(kind, "orthogonal")
    if kind == "linear":  # whose sizes are those of the factors in PEFT
        for one, other in zip(found, pefts(kind, "orthogonal"), strict=True):
            assert_same_distribution(one, other)
    a, b = found
    assert (b.flatten(1) @ a.flatten(1)).abs().max() < 1e-6 < 1e-3 < min(a.abs().mean(), b.abs().mean())


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float16, True), (torch.bfloat16, False), (torch.float64, True), (torch.float32, False)]
)
def test_factors_have_the_dtype_that_peft_gives_them(dtype, wide):
    model = Zoo().to(dtype)
    inject(model, zoo_config(autocast_adapter_dtype=wide))
    half = dtype in (torch.float16, torch.bfloat16)
    expected = torch.float32 if half and wide else dtype
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    reference = peft.get_peft_model(
        Zoo().to(dtype), peft.LoraConfig(target_modules=["conv"]), autocast_adapter_dtype=wide
    )
    assert {p.dtype for name, p in reference.named_parameters() if "lora_" in name} == {expected}


def test_factors_injected_in_inference_mode_train():
    model = Zoo()
    with torch.inference_mode():
        inject(model, zoo_config())
    randomise_(model)
    model(tokens()).sum().backward()
    assert model.conv.lora_A.grad is not None


@pytest.mark.parametrize(
    ("kind", "init"),
    covering(["linear", "conv"], [True, "orthogonal", "pissa", "pissa_niter_2", "olora"], meet=1),
)
def test_initial_factors_lie_in_memory_as_loaded_ones_do(kind, init):
    """Products of factors in another order of memory differ in their last bits."""
    assert all(factor.is_contiguous() for factor in ours(kind, init))


def test_factors_of_a_users_variant_lie_in_memory_as_loaded_ones_do():
    def start(self: Any, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        return {leaf: torch.ones(shape[::-1]).t() for leaf, shape in self.shapes(info).items()}

    with variants_forgotten():
        define_gated(start=start)
        model = nn.Sequential(nn.Linear(6, 4))
        inject(model, LoRAConfig(r=2, variant="gated"))
        assert all(parameter.is_contiguous() for parameter in model.parameters())
