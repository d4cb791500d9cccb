"""load_adapter onto an adapted model replaces its adapter by another of any rank, merged or not."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    is_merged,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_lora.nn.adapted_module import adapted_layers
from support.covering import covering
from support.models.networks import (
    ZOO_LAYERS,
    base_zoo,
    checkpoint,
    randomise_,
    state_bits,
    tokens,
    trace,
    trained_zoo,
    zoo_config,
)
from support.runs.notices import TORCH_NOTICES
from support.runs.recorders import Recorder

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


@pytest.mark.parametrize(("name", "merged", "form"), covering(OTHERS, [True, False], ["folder", "checkpoint"], meet=1))
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


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_base_of_a_merged_model_is_exact_after_100_swaps(monkeypatch, dtype: torch.dtype, copies: bool):
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
    for swap in range(100):
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


def test_an_optimizer_goes_on_with_another_rank_when_its_state_is_cleared():
    model, other = base_zoo(), other_zoo(r=5)
    inject(model, zoo_config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=r"another rank, first 'embed'.*optimizer.state.clear"):
        load_adapter(model, checkpoint(other, "adapter"))
    assert model.conv.lora_A.grad is None
    optimizer.state.clear()
    reference = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        step(other, reference)
    assert state_bits(model) == state_bits(other)


# --- compiled ---


def graphs_of(merged: bool, *options: dict[str, Any]) -> list[int]:
    """How many graphs there are after the first call, and after each of the swaps, which go round twice."""
    torch.compiler.reset()  # of what torch has learnt to expect from other tests

    def build(seed: int, **given: Any) -> nn.Module:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        inject(net, LoRAConfig(**{"r": 2, **given}))
        return spread(net, seed)

    sources, x = [checkpoint(build(seed, **given), "adapter") for seed, given in enumerate(options)], torch.ones(4, 6)
    model, recorder = build(9), Recorder()
    merge(model) if merged else None
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    compiled(x)
    counts = [len(recorder.graphs)]
    for source in sources * 2:
        load_adapter(model, source)
        torch.testing.assert_close(compiled(x), model(x))
        counts.append(len(recorder.graphs))
    return counts


def test_equal_ranks_and_a_merged_model_whatever_the_rank_compile_nothing_anew():
    assert graphs_of(False, {}, {}) == [1] * 5
    assert graphs_of(True, {"r": 3}, {"lora_alpha": 5}, {"r": 1}) == [1] * 7


def test_another_scaling_compiles_once():
    assert graphs_of(False, {"lora_alpha": 3}, {"lora_alpha": 5}, {"lora_alpha": 7}) == [1, *[2] * 6]


def test_other_ranks_compile_once_each_at_most():
    counts = graphs_of(False, {"r": 3}, {"r": 5})
    assert counts[1] == 2
    assert counts[2] == counts[-1] <= 3


# --- all or nothing ---


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
