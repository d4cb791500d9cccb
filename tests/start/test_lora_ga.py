"""A and B that start from gradients: peft's LoRA-GA, and what the gradient's decomposition says in float64."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    initialize_from_data,
    inject,
)
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.start import lora_ga
from support.models.peers import logits
from support.models.peers import model as peer
from support.runs.notices import PEER_NOTICES

HOOK_NOTICE = "ignore:Full backward hook is firing when gradients are computed"  # of peft's own hook

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES, HOOK_NOTICE)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
R, ALPHA = 3, 6


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(30, (2, 5), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def injected(name: str, **options: Any) -> nn.Module:
    net = peer(name)
    inject(net, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS[name], init_lora_weights="lora_ga", **options))
    return net


def gradients(name: str) -> dict[str, torch.Tensor]:
    """The mean gradient of each weight over the batches, (out, in), by autograd alone."""
    net = peer(name).eval()
    for batch in batches():
        (net(**batch).loss / len(batches())).backward()
    turned = name == "gpt2"
    return {
        module: (layer.weight.grad.T if turned else layer.weight.grad).double()
        for module, layer in net.named_modules()
        if module.rpartition(".")[2] in TARGETS[name]
    }


@pytest.mark.parametrize("name", TARGETS)
def test_factors_are_the_gradients_singular_vectors(name: str):
    net = injected(name)
    base = logits(peer(name))
    initialize_from_data(net, batches())
    assert torch.equal(logits(net), base)
    for module, gradient in gradients(name).items():
        layer = adapted_layers(net)[module]
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        inputs = layer.lora_A.double().T @ layer.lora_A.double()
        torch.testing.assert_close(inputs, right[:R].T @ right[:R], rtol=0, atol=1e-4)
        outputs = layer.lora_B.double() @ layer.lora_B.double().T
        scale = gradient.shape[0] ** 0.5 / 16
        second = left[:, R : 2 * R] * values[R : 2 * R]
        torch.testing.assert_close(outputs, second @ second.T * scale, rtol=1e-3, atol=1e-5 * values[0] ** 2)
        assert torch.equal(layer.lora_A, layer.lora_start_A)
        assert torch.equal(layer.lora_B, layer.lora_start_B)


def test_batches_run_without_the_adapters_which_act_again_after_an_exception():
    net = injected("llama")
    layers = adapted_layers(net).values()

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert not any(layer.lora_active for layer in layers)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initialize_from_data(net, batches(), forward)
    assert all(layer.lora_active for layer in layers)


def test_mean_gradient_of_a_bfloat16_weight_is_summed_in_float32():
    """Of eight batches, 256 + 7 * 1 are 256 in bfloat16, where each 1 is rounded away."""
    layer = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    batches = [torch.tensor([[256.0, 1.0], [1.0, 0.0]])] + 7 * [torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    found = lora_ga._mean_gradients(
        layer, {"": layer.weight}, batches, lambda model, batch: (model.weight * batch).sum(), len(batches)
    )
    assert torch.equal(found[""], torch.stack(batches).mean(0))


def test_model_trains_as_peft_does():
    """peft takes B0 @ A0 out of the weight, here it is subtracted beside it: the same model after each step."""
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=TARGETS["llama"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    base = peer("llama").eval()

    def train_step() -> None:
        for batch in batches():
            base(**batch).loss.backward()

    preprocess_loraga(base, config, train_step)
    torch.manual_seed(lora_ga.SEED)
    theirs, ours = peft.get_peft_model(base, config), injected("llama")
    initialize_from_data(ours, batches())
    for step in range(4):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)
        for net in (ours, theirs):
            net.train()
            parameters = [p for p in net.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.2)
            optimizer.zero_grad()
            net(**batches(4)[step]).loss.backward()
            optimizer.step()
    assert not torch.allclose(logits(ours), logits(peer("llama")), atol=1e-2)


def test_everything_but_the_factors_is_as_before():
    net = injected("llama", modules_to_save=["norm"])
    net.model.layers[0].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    trained = net.model.norm.weight
    trained.grad = torch.ones_like(trained)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    initialize_from_data(net, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == required
    assert torch.equal(trained.grad, torch.ones_like(trained))
    assert not [name for name, p in net.named_parameters() if p.grad is not None and p is not trained]
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    factors = set(adapter_state_dict(net)) - {"model.norm.weight"}
    assert changed == factors


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).square().mean() + 0 * self.idle(x).detach().sum()


@pytest.mark.parametrize(
    ("data", "forward", "said"),
    [
        ([], lambda m, x: m(x), "there are no batches"),
        ([torch.ones(2, 4)], lambda m, x: m(x), "no gradient reaches the weight of 'idle'"),
        (
            [torch.full((2, 4), torch.nan)],
            lambda m, x: m(x) + m.idle(x).sum(),
            "gradients of the weight of 'used' hold NaN or Inf",
        ),
    ],
    ids=["no batches", "no gradient", "NaN"],
)
def test_what_has_no_gradients_is_refused_and_left_as_it_is(data: Any, forward: Any, said: str):
    inject(net := Quiet(), LoRAConfig(r=2, target_modules=["used", "idle"], init_lora_weights="lora_ga"))
    before = copy.deepcopy(net.state_dict())
    required = [p.requires_grad for p in net.parameters()]
    with pytest.raises(LoRAError, match=said):
        initialize_from_data(net, data, forward)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == required
    assert net.training


def test_quantized_weight_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu"))
    inject(net, LoRAConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga"))
    with pytest.raises(LoRAError, match="the weight of '0' is quantized"):
        initialize_from_data(net, [torch.ones(2, 64)], lambda model, x: model(x).sum())
