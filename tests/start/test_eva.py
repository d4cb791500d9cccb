"""A that starts from data: principal components as in peft's EVA, and the exact ones of all rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    initialize_from_data,
    inject,
    merge,
    unload,
)
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.start.eva import PrincipalComponents
from support.models.peers import logits
from support.models.peers import model as peer
from support.runs.notices import PEER_NOTICES

EVA_NOTICE = "ignore:lora with eva initialization used with low_cpu_mem_usage=False"

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES, EVA_NOTICE)

TARGETS = {
    "llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


def batches(count: int = 18) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens, of which some are padding and some are not learned from."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        tokens = torch.randint(30, (4, 12), generator=generator)
        mask = (torch.rand(4, 12, generator=generator) > 0.2).long()
        labels = tokens.where(torch.rand(4, 12, generator=generator) > 0.3, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def injected(name: str, **options: Any) -> nn.Module:
    net = peer(name)
    inject(net, LoRAConfig(r=3, lora_alpha=6, target_modules=TARGETS[name], init_lora_weights="eva", **options))
    return net


def theirs(name: str, batches: list[Any], **options: Any) -> peft.PeftModel:
    """peft's start from these batches, each read once: nothing has converged before the last one is read."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=TARGETS[name],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    model = peft.get_peft_model(peer(name), config)
    tau, reads = torch.tensor(2.0), 0  # no cosine similarity is so large
    model.peft_config["default"].eva_config.tau = tau

    def forward(model: nn.Module, batch: Any) -> None:
        nonlocal reads
        reads += 1
        if reads == len(batches) + 1:  # peft reads the first one twice, to look for equal inputs
            tau.fill_(-2.0)
        model(**batch)

    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    assert reads == len(batches) + 1
    return model


@pytest.mark.parametrize(("name", "options"), [("llama", {"rank_pattern": {"o_proj": 5}}), ("gpt2", {})])
def test_factors_are_those_of_peft_after_the_first_16_batches_and_outputs_the_bases(name: str, options: dict[str, Any]):
    net, their_model = injected(name, **options), theirs(name, batches(16), **options)
    base = logits(peer(name))
    initialize_from_data(net, batches())
    for layer_name, layer in adapted_layers(net).items():
        expected = their_model.base_model.model.get_submodule(layer_name).lora_A["default"].weight
        torch.testing.assert_close(layer.lora_A, expected, rtol=0, atol=3e-5)  # peft's are 1e-5 off those in float64
    assert torch.equal(logits(net), base)


def test_components_are_those_of_all_rows_about_their_mean():
    """Rows of rank 3 about a mean: nothing is lost between batches, so that the exact answer is known."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3))[0].T * torch.tensor([[9.0], [4.0], [1.0]])
    rows = torch.randn(90, 3) @ basis + 4.0
    found, peer_pca = PrincipalComponents(3, 10, rows.device), IncrementalPCA(3, lowrank=True, lowrank_seed=42)
    for part in rows.split([30, 20, 40]):
        found.add(part)
        peer_pca.partial_fit(part)
    _, values, right = torch.linalg.svd((rows - rows.mean(0)).double())
    torch.testing.assert_close((found.components @ right[:3].T).abs(), torch.eye(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.strengths, values[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.components, peer_pca.components_.double(), rtol=0, atol=1e-5)


def test_batches_of_fewer_rows_than_components_give_the_components_of_all_rows():
    torch.manual_seed(0)
    rows = torch.randn(12, 6) * torch.arange(6, 0, -1)
    found = PrincipalComponents(5, 6, rows.device)
    for part in rows.split([1, 3, 0, 8]):
        found.add(part)
    _, _, right = torch.linalg.svd((rows - rows.mean(0)).double())
    torch.testing.assert_close(found.components.T @ found.components, right[:5].T @ right[:5], rtol=0, atol=1e-6)


class Net(nn.Module):
    """Two layers that get one input, a third that gets another, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self.conv = nn.Conv1d(3, 3, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.conv(x))
        result: torch.Tensor = self.c((self.a(x) + self.b(x)).tanh())
        return result


def rows(count: int = 200) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(6, 0, -1) ** 2
    return (torch.randn(8, 3, 6, generator=generator) * scale for _ in range(count))


def adapted(targets: list[str] | None = None, r: int = 2, **options: Any) -> Net:
    targets = targets or ["a", "b", "c", "conv"]
    inject(net := Net(), LoRAConfig(r=r, target_modules=targets, init_lora_weights="eva", **options))
    return net


def test_random_stream_modes_and_other_parameters_stay(caplog):
    net = adapted()
    net.conv.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    with caplog.at_level("INFO"):
        initialize_from_data(net, rows())
    assert "conv start without data" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in net.named_modules()} == modes
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"a.lora_A", "b.lora_A", "c.lora_A"}
    assert torch.equal(net.a.lora_A, net.b.lora_A)
    for layer in (net.a, net.c):
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("init", "options", "read"), [("eva", {}, 16), ("lora_ga", {"n": 3}, 3)])
def test_no_batch_beyond_the_first_n_is_read(init: str, options: dict[str, int], read: int):
    inject(net := nn.Sequential(nn.Linear(6, 5)), LoRAConfig(r=2, target_modules=["0"], init_lora_weights=init))
    data = iter(rows(20))
    initialize_from_data(net, data, lambda model, x: model(x).square().mean(), **options)
    assert len(list(data)) == 20 - read


def test_rank_beyond_the_number_of_features_is_not_used():
    net = adapted(["c"], r=7)
    initialize_from_data(net, rows())
    assert net.c.lora_A[:5].norm() > 0
    assert not net.c.lora_A[5:].any()


def test_adapter_in_bfloat16_gets_the_values_rounded():
    nets = [adapted(["a"]) for _ in range(2)]
    nets[1].a.lora_A.data = nets[1].a.lora_A.data.bfloat16()
    for net in nets:
        initialize_from_data(net, rows())
    assert torch.equal(nets[1].a.lora_A, nets[0].a.lora_A.bfloat16())


def train_(net: Net) -> None:
    net.a.lora_B.data.fill_(1.0)


@pytest.mark.parametrize(
    ("spoil", "data", "said"),
    [
        (lambda net: unload(net), rows, "was not injected"),
        (merge, rows, "the model is merged; call unmerge"),
        (train_, rows, r"B of 'a' is not zero, so the adapter was trained or loaded"),
        (lambda net: None, list, "there are no batches"),
        (lambda net: None, lambda: [torch.full((8, 3, 6), torch.nan)], r"the inputs of '[abc]' hold NaN or Inf"),
        (
            lambda net: setattr(net, "forward", lambda x: net.conv(x)),
            rows,
            r"'[abc]' did not run in the forward \(3 of 3",
        ),
        (lambda net: None, lambda: [torch.ones(1, 3, 6)[:, :1].expand(1, 3, 6)[:0]], "all batches together have 0"),
    ],
    ids=["not injected", "merged", "trained", "no batches", "NaN", "a layer that does not run", "too few rows"],
)
def test_what_cannot_start_from_data_is_refused_and_left_as_it_is(spoil: Any, data: Any, said: str):
    net = adapted(["a", "b", "c"])
    spoil(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(LoRAError, match=said):
        initialize_from_data(net, data())
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in net.state_dict().items())
    assert net.training
    assert not [module for module in net.modules() if module._forward_pre_hooks and module is not net]


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(LoRAError, match="none of the 1 adapted layers is linear"):
        initialize_from_data(adapted(["conv"]), rows())


def test_own_forward_and_mask_choose_the_rows():
    net, other = adapted(["a", "c"]), adapted(["a", "c"])
    data = list(rows())
    initialize_from_data(
        net, ({"x": x, "keep": x[..., 0] > 0} for x in data), lambda m, b: m(b["x"]), mask=lambda b: b["keep"]
    )
    initialize_from_data(other, data)
    assert not torch.allclose(net.a.lora_A, other.a.lora_A)


def test_quantized_base_starts_from_its_inputs():
    bnb = pytest.importorskip("bitsandbytes")
    net = Net()
    quantized = bnb.nn.Linear4bit(6, 5, quant_type="nf4", compute_dtype=torch.float32)
    quantized.load_state_dict(net.a.state_dict())
    net.a = quantized.to("cpu")
    inject(net, LoRAConfig(r=2, target_modules=["a"], init_lora_weights="eva"))
    plain = adapted(["a"])
    initialize_from_data(net, rows())
    initialize_from_data(plain, rows())
    assert torch.equal(net.a.lora_A, plain.a.lora_A)
