"""A that starts from data: principal components and ranks as in peft's EVA, and the exact ones of all rows."""

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
    load_adapter,
    merge,
    redistribute_ranks,
    save_adapter,
    unload,
)
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.start import ranks
from lightning_lora.start.eva import PrincipalComponents
from support.notices import PEER_NOTICES
from support.peers import logits
from support.peers import model as peer

EVA_NOTICE = "ignore:lora with eva initialization used with low_cpu_mem_usage=False"

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES, EVA_NOTICE)

TARGETS = {
    "llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


def batches(count: int = 60) -> list[dict[str, torch.Tensor]]:
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


def theirs(name: str, rho: float, **options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=TARGETS[name],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    model = peft.get_peft_model(peer(name), config)
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    return model


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"o_proj|c_proj": 5}}], ids=["one rank", "rank_pattern"])
@pytest.mark.parametrize("name", TARGETS)
def test_factors_are_those_of_peft_and_outputs_the_bases(name: str, options: dict[str, Any]):
    net, their_model = injected(name, **options), theirs(name, 1.0, **options)
    base = logits(peer(name))
    initialize_from_data(net, batches())
    for layer_name, layer in adapted_layers(net).items():
        expected = their_model.base_model.model.get_submodule(layer_name).lora_A["default"].weight
        torch.testing.assert_close(layer.lora_A, expected, rtol=0, atol=3e-5)  # peft's are 1e-5 off those in float64
    assert torch.equal(logits(net), base)


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_ranks_are_divided_as_in_peft(name: str, adjust: bool):
    net, their_model = injected(name), theirs(name, 2.0)
    config = redistribute_ranks(net, batches(), adjust_alpha=adjust)
    expected = dict.fromkeys(adapted_layers(net), 0)
    for module_name, module in their_model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            expected[module_name] = module.r["default"]
    assert len(set(expected.values())) > 1
    kept = [layer for layer, r in expected.items() if r]
    assert list(config.exclude_modules or ()) == [layer for layer, r in expected.items() if not r]
    assert {layer: config.rank(layer) for layer in kept} == {layer: expected[layer] for layer in kept}
    assert sum(expected.values()) == 3 * len(expected)
    for layer in kept:
        assert config.scaling(layer) == pytest.approx(2.0 if adjust else 6 / expected[layer])
    unload(net)
    assert set(inject(net, config)) == set(kept)
    initialize_from_data(net, batches())


def test_rslora_keeps_its_scaling_when_ranks_are_divided():
    net = injected("llama", use_rslora=True)
    config = redistribute_ranks(net, batches())
    ranks = {name: config.rank(name) for name in adapted_layers(net)}
    assert len(set(ranks.values())) > 1
    assert all(config.scaling(name) == pytest.approx(6 / 3**0.5) for name in ranks)


@pytest.mark.parametrize("centre", [0.0, 4.0])
def test_components_are_those_of_all_rows_about_their_mean(centre: float):
    """Rows of rank 3 about a mean: nothing is lost between batches, so that the exact answer is known."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3))[0].T * torch.tensor([[9.0], [4.0], [1.0]])
    rows = torch.randn(90, 3) @ basis + centre
    found, peer_pca = PrincipalComponents(3, 0.99), IncrementalPCA(3, lowrank=True, lowrank_seed=42)
    for part in rows.split([30, 20, 40]):
        found.add(part)
        peer_pca.partial_fit(part)
    _, values, right = torch.linalg.svd((rows - rows.mean(0)).double())
    torch.testing.assert_close(
        (found.components.double() @ right[:3].T).abs(), torch.eye(3).double(), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(found.explained, values[:3] ** 2 / (values**2).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.components.double(), peer_pca.components_.double(), rtol=0, atol=1e-5)


def test_rows_that_are_too_few_wait_for_more():
    torch.manual_seed(0)
    rows = torch.randn(12, 6)
    found, at_once = PrincipalComponents(4, 0.99), PrincipalComponents(4, 0.99)
    for part in rows.split(3):
        found.add(part)
    at_once.add(rows[:6])
    at_once.add(rows[6:])
    torch.testing.assert_close(found.components, at_once.components)


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


def test_equal_inputs_are_decomposed_once(monkeypatch: pytest.MonkeyPatch):
    decomposed = []
    honest = PrincipalComponents.add
    monkeypatch.setattr(PrincipalComponents, "add", lambda self, x: (decomposed.append(x.shape[1]), honest(self, x)))
    initialize_from_data(adapted(), rows(3), tau=-1.0)
    assert decomposed == [6, 5, 6, 5]  # of two batches: then all have converged


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


def test_components_that_did_not_converge_are_named_and_used():
    net = adapted(["a", "c"])
    with pytest.warns(UserWarning, match=r"components of a, c \(2 of 2 layers\) had not converged"):
        initialize_from_data(net, rows(1))
    torch.testing.assert_close(net.a.lora_A @ net.a.lora_A.T, torch.eye(2), rtol=0, atol=1e-5)


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
@pytest.mark.parametrize("act", [initialize_from_data, redistribute_ranks])
def test_what_cannot_start_from_data_is_refused_and_left_as_it_is(act: Any, spoil: Any, data: Any, said: str):
    net = adapted(["a", "b", "c"])
    spoil(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(LoRAError, match=said):
        act(net, data())
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in net.state_dict().items())
    assert net.training
    assert not [module for module in net.modules() if module._forward_pre_hooks and module is not net]


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(LoRAError, match="none of the 1 adapted layers is linear"):
        initialize_from_data(adapted(["conv"]), rows())


@pytest.mark.parametrize("rho", [0.5, float("nan")])
def test_rho_below_one_is_refused(rho: float):
    with pytest.raises(LoRAError, match="rho must be a number of at least 1"):
        redistribute_ranks(adapted(["a"]), rows(), rho=rho)


@pytest.mark.parametrize("excluded", [None, ["conv"]])
def test_layers_that_get_no_rank_are_excluded(monkeypatch: pytest.MonkeyPatch, excluded: Any):
    monkeypatch.setattr(ranks, "_divide", lambda budget, *components: {"a": budget, "c": 0})
    config = redistribute_ranks(adapted(["a", "c"], exclude_modules=excluded), rows())
    assert list(config.exclude_modules) == [*(excluded or []), "c"]
    assert inject(Net(), config) == ["a"]


def test_layers_without_a_rank_cannot_be_added_to_an_expression(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "_divide", lambda budget, *components: {"a": budget, "c": 0})
    with pytest.raises(LoRAError, match=r"c get no rank and would be added .* exclude_modules='conv"):
        redistribute_ranks(adapted(["a", "c"], exclude_modules="conv.*"), rows())


def test_folder_is_plain_lora_for_peft_and_loads_here(tmp_path):
    net = injected("llama")
    initialize_from_data(net, batches())
    for layer in adapted_layers(net).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(net, tmp_path)
    read = peft.PeftModel.from_pretrained(peer("llama"), tmp_path)
    assert read.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(read), logits(net), rtol=0, atol=1e-5)
    again = peer("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(net))


def test_own_forward_and_mask_choose_the_rows():
    net, other = adapted(["a", "c"]), adapted(["a", "c"])
    data = list(rows())
    initialize_from_data(
        net, ({"x": x, "keep": x[..., 0] > 0} for x in data), lambda m, b: m(b["x"]), mask=lambda b: b["keep"]
    )
    initialize_from_data(other, data)
    assert not torch.allclose(net.a.lora_A, other.a.lora_A)


def test_quantised_base_starts_from_its_inputs():
    bnb = pytest.importorskip("bitsandbytes")
    net = Net()
    quantised = bnb.nn.Linear4bit(6, 5, quant_type="nf4", compute_dtype=torch.float32)
    quantised.load_state_dict(net.a.state_dict())
    net.a = quantised.to("cpu")
    inject(net, LoRAConfig(r=2, target_modules=["a"], init_lora_weights="eva"))
    plain = adapted(["a"])
    initialize_from_data(net, rows())
    initialize_from_data(plain, rows())
    assert torch.equal(net.a.lora_A, plain.a.lora_A)
