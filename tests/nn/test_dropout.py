"""lora_dropout: nothing in evaluation, active and unbiased in training, for layers with their own forward too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, disable_adapter, inject
from lightning_lora.nn.lora_layer import drop
from support.layers import CASES, make_subject

P = 0.4
LOOKED_UP = [name for name in CASES if "embedding" in name]  # no dropout, as in PEFT and loralib
NOT_LINEAR = ["activated linear", "dora, activated linear"]  # the mean of its outputs is not the output of the mean
DROPPING = [name for name in CASES if name not in LOOKED_UP]


@pytest.mark.parametrize("name", CASES)
def test_dropout_does_nothing_in_evaluation(name: str) -> None:
    subject, same = make_subject(name, lora_dropout=P), make_subject(name)
    same.model.load_state_dict(subject.model.state_dict())
    for model in (subject.model, subject.model.train().eval()):
        assert torch.equal(model(subject.x), same.model(subject.x))


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_in_training_is_active_and_unbiased(name: str) -> None:
    subject = make_subject(name, torch.float64, lora_dropout=P)
    wanted = subject.model(subject.x).detach()
    subject.model.train()
    with torch.no_grad():
        outputs = torch.stack([subject.model(subject.x) for _ in range(600)])
    deviation = outputs.std(0)
    assert (deviation > 0).any()
    if name not in NOT_LINEAR:
        # Of some hundred independent means, one beyond six standard errors is one case in a million.
        assert ((outputs.mean(0) - wanted).abs() <= 6 * deviation / 600**0.5 + 1e-9).all()


@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "conv2d, pointwise", "fused, all parts"])
def test_the_share_of_dropped_features_is_p(name: str) -> None:
    """Where only one input feature is not zero, the adapter's output is there, scaled, or it is not."""
    subject = make_subject(name, torch.float64, lora_dropout=P)
    subject.x.zero_()
    channel = subject.x.select(-1 if subject.x.dim() < 4 else 1, 2)
    channel.fill_(1.0)
    full = subject.model(subject.x).detach() - subject.plain(subject.x)
    subject.model.train()
    with torch.no_grad():
        found = torch.stack([subject.model(subject.x) for _ in range(500)]) - subject.plain(subject.x)
    share = found / full
    kept = share.abs() > 0.5
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / (1 - P)), rtol=1e-4, atol=0)
    assert (share[~kept].abs() < 1e-9).all()
    assert abs(kept.double().mean() - (1 - P)) < 0.1


@pytest.mark.parametrize("name", LOOKED_UP)
def test_dropout_on_an_embedding_drops_nothing(name: str) -> None:
    subject = make_subject(name, lora_dropout=P)
    assert torch.equal(subject.model.train()(subject.x), subject.model.eval()(subject.x))


@pytest.mark.parametrize("name", DROPPING)
def test_gradients_with_dropout_belong_to_the_mask_that_was_drawn(name: str) -> None:
    """Finite differences under one and the same random stream."""
    subject = make_subject(name, torch.float64, lora_dropout=P)
    subject.model.train()
    layer = subject.layer
    if name.startswith("dora"):  # the gradient passes over the norm
        fixed = layer.norms(layer.weight, layer.lora_A, layer.lora_B)
        layer.norms = lambda *args: fixed

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return subject.model(subject.x).sum()

    loss().backward()
    for factor in layer.factors():
        direction = torch.randn_like(factor)
        with torch.no_grad():
            factor.add_(direction, alpha=1e-5)
            above = loss()
            factor.add_(direction, alpha=-2e-5)
            below = loss()
            factor.add_(direction, alpha=1e-5)
        assert factor.grad is not None
        torch.testing.assert_close((above - below) / 2e-5, (factor.grad * direction).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv that pads", "fused, outer parts"])
def test_disabled_adapter_in_training_drops_nothing(name: str) -> None:
    subject = make_subject(name, lora_dropout=P)
    subject.model.train()
    with disable_adapter(subject.model):
        assert torch.equal(subject.model(subject.x), subject.plain(subject.x))


def test_dropout_leaves_the_input_of_the_base_whole() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 6))
    plain = nn.Linear(8, 6)
    plain.load_state_dict(model[0].state_dict())
    inject(model, LoRAConfig(r=2, lora_dropout=0.9))
    x = torch.randn(4, 8)
    assert torch.equal(model.train()(x), plain.requires_grad_(False)(x))  # B is zero


@pytest.mark.parametrize("value", [1.0, -0.1, 1.5, True, "0.1"])
def test_dropout_that_is_no_probability_is_refused(value: Any) -> None:
    with pytest.raises(LoRAError, match="lora_dropout must be a probability"):
        LoRAConfig(lora_dropout=value)


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_a_share_beyond_what_16_bits_tell_keeps_outputs_finite(p: float) -> None:
    x, factor = drop(torch.ones(8), p)
    assert torch.isfinite(x * factor).all()
    assert 1 <= factor <= 2**16
