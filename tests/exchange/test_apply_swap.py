"""load_adapter onto an adapted model replaces its adapter by another of any rank, merged or not."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    save_adapter,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import AdaptedModel
from lightning_lora.nn.adapted_weights import adapted_layers
from support.models import (
    ZOO_LAYERS,
    base_zoo,
    checkpoint,
    randomise_,
    state_bits,
    tokens,
    trace,
    train,
    trained_zoo,
    zoo_config,
)
from support.notices import TORCH_NOTICES
from support.parameters import Experts
from support.recorders import Recorder

pytestmark = TORCH_NOTICES

MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function

OTHERS: dict[str, dict[str, Any]] = {
    "same options": {},
    "lower rank": {"r": 1},
    "higher rank": {"r": 5, "lora_alpha": 3},
    "rank by rank": {"r": 3, "rank_pattern": {"conv": 1}, "alpha_pattern": {"embed": 2}},
    "rslora": {"use_rslora": True, "r": 4},
    "scaling": {"lora_alpha": 5},
}


def spread(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def other_zoo(seed: int = 4, **options: Any) -> nn.Module:
    model = base_zoo()
    inject(model, zoo_config(**options))
    return spread(model, seed)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_a_swapped_model_is_the_one_that_the_adapter_was_loaded_into_first(
    tmp_path: Path, name: str, merged: bool, form: str
):
    other = other_zoo(**OTHERS[name])
    save_adapter(other, tmp_path / "other")
    source: Any = tmp_path / "other" if form == "folder" else checkpoint(other, "adapter")
    expected = base_zoo()
    load_adapter(expected, source)
    model = trained_zoo()
    merge(model) if merged else None
    parameters, memory = dict(model.named_parameters()), model.conv.weight.data_ptr()
    assert load_adapter(model, source) == ZOO_LAYERS
    assert is_merged(model) == merged
    assert model.conv.weight.data_ptr() == memory
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert state_bits(model) == state_bits(expected) == state_bits(other)
    merge(expected) if merged else None
    assert torch.equal(model(tokens()), expected(tokens()))
    unmerge(model)
    assert torch.equal(model(tokens()), other(tokens()))
    found, wanted = ({n: layer.lora.spec for n, layer in adapted_layers(m).items()} for m in (model, other))
    assert {n: (s.r, s.scaling, s.alpha) for n, s in found.items()} == {
        n: (s.r, s.scaling, s.alpha) for n, s in wanted.items()
    }
    save_adapter(model, tmp_path / "again")
    fresh = base_zoo()
    load_adapter(fresh, tmp_path / "again")
    assert state_bits(fresh) == state_bits(other)
    unload(model)
    assert state_bits(model) == state_bits(base_zoo())


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_an_adapter_that_starts_from_the_weight_takes_another_rank(
    tmp_path: Path, init: str, form: str, merged: bool
) -> None:
    def build(rank: int) -> Any:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 10), nn.Conv2d(1, 4, 3))
        inject(net, LoRAConfig(r=rank, target_modules=["0", "1"], init_lora_weights=init))
        return spread(net, rank)

    net, other = build(2), build(4)
    save_adapter(other, tmp_path) if form == "folder" else None
    merge(net) if merged else None
    load_adapter(net, tmp_path if form == "folder" else checkpoint(other, "adapter"))
    merge(other) if merged else None
    x = torch.randn(3, 12)
    assert torch.equal(net[0](x), other[0](x))
    for each in (net, other):
        unmerge(each)
    assert state_bits(net) == state_bits(other)
    assert torch.equal(net[0](x), other[0](x))


def test_a_swap_that_fails_gives_a_start_of_another_rank_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(rank: int) -> nn.Module:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 10))
        inject(net, LoRAConfig(r=rank, target_modules=["0"], init_lora_weights="pissa"))
        return spread(net, rank)

    def fail(*args: object, **kwargs: object) -> None:
        raise LoRAError("on the way.")

    net, other = build(2), build(4)
    before = state_bits(net)
    monkeypatch.setattr(AdaptedModel, "record_trainable", fail)
    with pytest.raises(LoRAError, match="on the way"):
        load_adapter(net, checkpoint(other, "adapter"))
    assert state_bits(net) == before


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=3)
        self.lstm = nn.LSTM(4, 5)
        self.mix = Experts()


def test_every_kind_of_layer_takes_another_rank():
    experts = [name for name, parameter in Experts().named_parameters() if parameter.dim() == 3]
    options: dict[str, Any] = {
        "target_modules": ["qkv", "attention"],
        "target_parameters": ["weight_hh_l0", *experts],
        "enable_lora": {"qkv": [True, False, True]},
    }
    nets = []
    for rank in (2, 3):
        torch.manual_seed(1)
        net = Kinds()
        inject(net, LoRAConfig(r=rank, **options))
        nets.append(spread(net, rank))
    merge(nets[0])
    load_adapter(nets[0], checkpoint(nets[1], "adapter"))
    merge(nets[1])
    assert {n: p.tolist() for n, p in nets[0].named_parameters()} == {
        n: p.tolist() for n, p in nets[1].named_parameters()
    }
    for net in nets:
        unmerge(net)
    assert state_bits(nets[0]) == state_bits(nets[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [True, False])
def test_the_base_of_a_merged_model_is_exact_after_200_swaps(monkeypatch, dtype: torch.dtype, copies: bool):
    if not copies:
        monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)).to(dtype)

    sources = []
    for rank in (1, 4, 4, 7):
        net = build()
        inject(net, LoRAConfig(r=rank, lora_alpha=2 * rank))
        sources.append(checkpoint(spread(net, rank), "adapter"))
    model = build()
    load_adapter(model, sources[0])
    merge(model)
    base = state_bits(build())
    kept = []
    for swap in range(200):
        load_adapter(model, sources[swap % 4])
        kept.append(sum(r.nbytes() for layer in adapted_layers(model).values() if (r := layer.lora.undo) is not None))
        if swap % 20 == 3:
            assert {name: bits for name, bits in state_bits(model).items() if name in base} == base
    assert is_merged(model)
    assert kept[-4:] == kept[4:8]
    unmerge(model)
    assert {name: bits for name, bits in state_bits(model).items() if name in base} == base
    unload(model)
    assert state_bits(model) == base


# --- training goes on ---


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(tokens()).square().mean().backward()
    optimizer.step()


def test_an_optimizer_goes_on_with_its_state_where_ranks_are_equal():
    model, other = trained_zoo(), other_zoo()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer)
    load_adapter(model, checkpoint(other, "adapter"))
    before = adapter_state_dict(other)
    step(model, optimizer)
    assert optimizer.state[model.conv.lora_B]["step"] == 2
    for name in ("conv.lora_A", "conv.lora_B", "body.0.lora_B"):
        assert not torch.equal(model.get_parameter(name), before[name])


@pytest.mark.parametrize("trained", [True, False])
def test_an_optimizer_goes_on_with_another_rank_when_its_state_is_cleared(trained: bool, recwarn):
    model, other = base_zoo(), other_zoo(r=5)
    inject(model, zoo_config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if trained:
        step(model, optimizer)
        with pytest.warns(
            UserWarning, match=r"4 layers that have gradients get another rank, first 'embed'.*optimizer.state.clear"
        ):
            load_adapter(model, checkpoint(other, "adapter"))
        assert model.conv.lora_A.grad is None
        optimizer.state.clear()
    else:
        load_adapter(model, checkpoint(other, "adapter"))
    reference = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        step(other, reference)
    assert state_bits(model) == state_bits(other)


# --- compiled ---


def graphs_of(merged: bool, *options: dict[str, Any]) -> list[int]:
    """How many graphs there are after the first call, and after each of the swaps, which go round twice."""
    torch.compiler.reset()  # of what torch has learnt to expect from other tests
    sources = [checkpoint(other_zoo(seed + 4, **given), "adapter") for seed, given in enumerate(options)]
    model, recorder = trained_zoo(), Recorder()
    merge(model) if merged else None
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    compiled(tokens())
    counts = [len(recorder.graphs)]
    for source in sources * 2:
        load_adapter(model, source)
        torch.testing.assert_close(compiled(tokens()), model(tokens()))
        counts.append(len(recorder.graphs))
    return counts


def test_equal_ranks_and_scalings_compile_nothing_anew():
    assert graphs_of(False, {}, {}) == [1] * 5


def test_another_scaling_compiles_once():
    assert graphs_of(False, {"lora_alpha": 3}, {"lora_alpha": 5}, {"lora_alpha": 7}) == [1, *[2] * 6]


def test_other_ranks_compile_once_each_at_most():
    counts = graphs_of(False, {"r": 3}, {"r": 5}, {"r": 4})
    assert counts[1] == 2
    assert counts[3] == counts[-1] <= 4


def test_a_merged_model_compiles_nothing_anew_whatever_the_rank():
    assert graphs_of(True, {"r": 3}, {"lora_alpha": 5}, {"r": 1}) == [1] * 7


# --- all or nothing ---


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("spoiled", ["conv.lora_A", "head.weight", "body.1.running_var"])
def test_a_refused_swap_to_another_rank_leaves_the_model_as_it_was(merged: bool, spoiled: str):
    state = checkpoint(other_zoo(r=5), "adapter")
    state["state_dict"][spoiled] = state["state_dict"][spoiled][..., :1]
    model = trained_zoo()
    config = model.lora_injection.config
    merge(model) if merged else None
    before, output = trace(model), model(tokens())
    with pytest.raises(LoRAError, match=spoiled):
        load_adapter(model, state)
    assert trace(model) == before
    assert torch.equal(model(tokens()), output)
    assert model.lora_injection.config == config


def test_a_swap_that_fails_when_it_is_merged_leaves_the_model_as_it_was():
    model, other = (base_zoo().half() for _ in range(2))
    inject(model, zoo_config())
    randomise_(model)
    inject(other, zoo_config(r=5))
    with torch.no_grad():
        for parameter in (other.conv.lora_A, other.conv.lora_B):
            parameter.fill_(1e3)
    merge(model)
    model.conv.lora_A.grad = gradient = torch.ones_like(model.conv.lora_A)
    before, specs = trace(model), {n: layer.lora.spec for n, layer in adapted_layers(model).items()}
    with (
        pytest.warns(UserWarning, match="gradients"),
        pytest.raises(LoRAError, match=r"layer 'conv': .*beyond the range"),
    ):
        load_adapter(model, checkpoint(other, "adapter"))
    assert is_merged(model)
    assert trace(model) == before
    assert {n: layer.lora.spec for n, layer in adapted_layers(model).items()} == specs
    assert model.conv.lora_A.grad is gradient
    assert model.lora_injection.config == zoo_config()


# --- options ---


def test_the_options_are_those_of_the_adapter_and_a_swap_logs_nothing(caplog):
    model = trained_zoo(lora_dropout=0.25)
    with caplog.at_level(logging.INFO, "lightning_lora"):
        load_adapter(model, checkpoint(other_zoo(r=5, lora_alpha=3, use_rslora=True), "adapter"))
    assert not caplog.text
    expected = zoo_config(r=5, lora_alpha=3, use_rslora=True, lora_dropout=0.25)  # which is of training here
    assert model.lora_injection.config == expected
    assert inject(model, expected) == ZOO_LAYERS
    with pytest.raises(LoRAError, match="r was 5, now 2"):
        inject(model, zoo_config())


def test_an_adapter_has_its_ranks_whatever_its_patterns_name_here():
    """As in a module around the network."""
    other = other_zoo(r=3, rank_pattern={"^conv": 1})
    around = nn.ModuleDict({"zoo": base_zoo()})
    inject(around, zoo_config(target_modules=["zoo.embed", "zoo.conv", "zoo.body.0", "zoo.body.3"]))
    network = around["zoo"]  # a handle of its own
    for model, source, ranks in (
        (around, other, [3, 1, 3, 3]),
        (network, other_zoo(r=4), [4, 4, 4, 4]),
        (network, other, [3, 1, 3, 3]),
    ):
        load_adapter(model, checkpoint(source, "adapter"))
        assert [adapted_layers(around)[f"zoo.{name}"].lora.spec.r for name in ZOO_LAYERS] == ranks
        assert [layer.r for layer in take_adapter(network).layers.values()] == ranks


def test_a_state_dict_without_options_keeps_the_rank():
    model = trained_zoo()
    with pytest.raises(LoRAError, match=r"'embed.lora_A' must have shape \(2, 11\), but has \(5, 11\)"):
        load_adapter(model, checkpoint(other_zoo(r=5), "bare"))


def test_a_copy_of_a_swapped_model_has_its_rank():
    model = trained_zoo()
    load_adapter(model, checkpoint(other_zoo(r=5), "adapter"))
    copied = copy.deepcopy(model)
    train(copied)
    assert copied.conv.lora_A.shape[0] == 5
    assert state_bits(model) == state_bits(other_zoo(r=5))


# --- whole modules and biases that one of two adapters has ---


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.classifier(self.second(self.norm(self.first(x)).relu()))
        return result


WHOLE: dict[str, tuple[dict[str, Any], set[str]]] = {  # options, what is trained whole
    "head": ({"modules_to_save": ["classifier"]}, {"classifier.weight", "classifier.bias"}),
    "task's head": ({"task_type": "SEQ_CLS"}, {"classifier.weight", "classifier.bias"}),
    "all biases": ({"bias": "all"}, {f"{name}.bias" for name in ("first", "norm", "second", "classifier")}),
    "biases of layers": ({"bias": "lora_only"}, {"first.bias", "second.bias"}),
}
SOURCES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "folder": lambda model, path: save_adapter(model, path) or path,  # type: ignore[func-returns-value]
    "adapter": lambda model, path: checkpoint(model, "adapter"),
    "full": lambda model, path: checkpoint(model, "full"),
    "in memory": lambda model, path: take_adapter(model),
}


def classifier(**options: Any) -> nn.Module:
    inject(model := Classifier(), LoRAConfig(**{"r": 2, "target_modules": ["first", "second"], **options}))
    return spread(model, 3)


@pytest.mark.parametrize("form", SOURCES)
@pytest.mark.parametrize("case", WHOLE)
def test_what_one_adapter_trains_whole_comes_and_goes_with_it(tmp_path: Path, case: str, form: str):
    options, names = WHOLE[case]
    other, other_without, x = classifier(**options), spread(classifier(), 5), torch.randn(4, 6)
    source = SOURCES[form](other, tmp_path / "with")
    without = SOURCES[form](other_without, tmp_path / "without")
    model = classifier()
    load_adapter(model, source)
    assert torch.equal(model(x), other(x))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == names
    assert take_adapter(model).tensors.keys() == trained
    with disable_adapter(model):
        assert torch.equal(model(x), Classifier()(x))
    load_adapter(model, without)
    assert torch.equal(model(x), other_without(x))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in trained if "lora_" in n}
    assert take_adapter(model).tensors.keys() == {n for n in trained if "lora_" in n}
    load_adapter(model, source)
    assert torch.equal(model(x), other(x))
    unload(model)
    assert state_bits(model) == state_bits(Classifier())
