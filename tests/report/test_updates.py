"""Norms and singular values of updates, against a full decomposition of s * B @ A in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import (
    LoRAConfig,
    adapter_stats,
    inject,
    merge,
    merged_state_dict,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.names import group_of
from lightning_lora.report.updates import Update, measure
from support.models.networks import Zoo
from support.models.parameters import Experts, Recurrent
from support.ranks.processes import world
from support.ranks.sharded import network, shard_

R = 2


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(2, 3, 2))


def fused() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(5, 12)})


Reference = Callable[[torch.Tensor], list[torch.Tensor]]  # the matrices of rank R in the change of a weight


def whole(delta: torch.Tensor) -> list[torch.Tensor]:
    return [delta.flatten(1)]


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Reference]] = {
    "linear, embedding, convolution": (Zoo, {"target_modules": ["embed", "conv", "body.0", "body.3"]}, whole),
    "convolutions with groups and in 3d": (grouped, {"target_modules": ["0", "1"]}, whole),
    "attention": (Attention, {"target_modules": ["mha"]}, whole),
    "q, k and v apart": (lambda: Attention(kdim=5, vdim=7), {"target_modules": ["mha"]}, whole),
    "fused, two parts of three": (
        fused,
        {"target_modules": ["qkv"], "enable_lora": {"qkv": [True, False, True]}},
        lambda delta: [part for part in delta.chunk(3) if part.any()],
    ),
    "recurrent": (lambda: Recurrent(nn.LSTM), {"target_modules": [], "target_parameters": ["rnn.weight_ih_l0"]}, whole),
    "experts": (Experts, {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}, list),
    "transposed experts": (
        lambda: Experts(True),
        {"target_modules": [], "target_parameters": ["gate_up_proj"]},
        list,
    ),
    "other ranks and scalings": (
        Zoo,
        {"target_modules": ["body.0", "head"], "rank_pattern": {"head": 3}, "use_rslora": True},
        whole,
    ),
}


def made(build: Callable[[], nn.Module], options: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    model = build().to(dtype)
    inject(model, LoRAConfig(**{"r": R, "lora_alpha": 3, "init_lora_weights": False} | options))
    return model


def changes(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each weight that merging changes, as it is and with what merging adds."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merged_state_dict(model)
    return {
        name: (state[name].double(), value.double() - state[name].double())
        for name, value in merged.items()
        if not torch.equal(value, state[name])
    }


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_singular_values_are_those_of_a_full_decomposition_and_ranks_those_of_statistics(name: str):
    build, options, matrices = MODELS[name]
    model = made(build, options)
    reference = changes(model)
    found = measure(model).layers
    assert found
    for layer, update in found.items():
        own = {key: pair for key, pair in reference.items() if key == layer or key.rpartition(".")[0] == layer}
        deltas = [pair[1] for pair in own.values()]
        expected = [torch.linalg.svdvals(part) for delta in deltas for part in matrices(delta)]
        spectra = [torch.tensor(spectrum, dtype=torch.float64) for spectrum in update.spectra]
        for values, full in zip(spectra, expected, strict=True):
            known = min(len(values), len(full))  # a matrix may be smaller than r
            torch.testing.assert_close(values[:known], full[:known], rtol=1e-9, atol=1e-12)
            assert float(full[known:].sum()) < 1e-12
            assert float(values[known:].sum()) == 0
        norm = math.sqrt(sum(float(each.square().sum()) for each in deltas))
        assert update.norm == pytest.approx(norm, rel=1e-9)
        assert {*map(len, update.spectra)} == {options.get("rank_pattern", {}).get(layer, R)}
        assert update.size == sum(matrix.numel() for delta in deltas for matrix in matrices(delta))
    groups: dict[str, list[float]] = {}
    for layer, update in found.items():
        groups.setdefault(group_of(layer), []).extend(update.ranks)
    ranks = {group: stats.rank for group, stats in adapter_stats(model).groups.items()}
    assert {group: mean(values) for group, values in groups.items()} == pytest.approx(ranks, rel=1e-6)


def test_updates_of_a_merged_model_are_those_of_the_unmerged_one():
    model = made(Zoo, {"target_modules": ["body.0", "conv"]}, torch.float32)
    before = measure(model).layers
    merge(model)
    assert measure(model).layers == before


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_updates_of_a_model_and_of_its_adapter_in_a_file_or_in_memory_are_the_same(
    tmp_path: Path, options: dict[str, Any]
):
    model = made(Zoo, {"target_modules": ["body.0", "body.3", "head"]} | options, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.add_(torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter")
    live = measure(model)
    for source in (tmp_path / "adapter", read_adapter(tmp_path / "adapter"), take_adapter(model)):
        found = measure(source)
        assert found.scaled
        assert {name: update.norm for name, update in found.layers.items()} == pytest.approx(
            {name: update.norm for name, update in live.layers.items()}, rel=1e-5
        )


def test_spectra_of_a_start_that_is_subtracted_have_up_to_twice_as_many_directions():
    model = made(
        lambda: nn.ModuleDict({"wide": nn.Linear(9, 8), "low": nn.Linear(9, 3)}), {"init_lora_weights": "pissa"}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.add_(torch.randn_like(parameter))
    found = measure(model).layers
    assert {name: len(update.spectra[0]) for name, update in found.items()} == {"wide": 4, "low": 3}


def of_a_sharded_model() -> dict[str, Update]:
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    shard_(net)
    return dict(measure(net).layers)


def of_a_model_with_one_sharded_layer() -> dict[str, Update]:
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    fully_shard(net[0])
    return dict(measure(net).layers)


@pytest.mark.parametrize("sharded", [of_a_sharded_model, of_a_model_with_one_sharded_layer])
def test_updates_of_a_sharded_model_are_those_of_the_whole_one_on_every_rank(sharded: Callable[[], dict[str, Update]]):
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    expected = measure(net).layers
    for found in world().run(sharded):
        assert {name: each.spectra for name, each in found.items()} == {n: e.spectra for n, e in expected.items()}
