"""Norms, singular values and cosines of updates, against a full decomposition of s * B @ A in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import LoRAConfig, LoRAError, inject, merge, merged_state_dict, save_adapter
from lightning_lora.adapter.products import singular_values
from lightning_lora.report.from_files import read_updates
from lightning_lora.report.from_model import updates_of_model
from lightning_lora.report.updates import Update, cosines, half_share
from support.models import Zoo, checkpoint
from support.parameters import Experts, Recurrent
from support.processes import world
from support.quantised import adapted, values_of
from support.sharded import network, shard_

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
def test_norms_and_singular_values_are_those_of_a_full_decomposition(name: str):
    build, options, matrices = MODELS[name]
    model = made(build, options)
    reference = changes(model)
    found = updates_of_model(model).layers
    assert found
    for layer, update in found.items():
        own = {key: pair for key, pair in reference.items() if key == layer or key.rpartition(".")[0] == layer}
        weights, deltas = ([pair[i] for pair in own.values()] for i in (0, 1))
        expected = [torch.linalg.svdvals(part) for delta in deltas for part in matrices(delta)]
        spectra = [torch.tensor(spectrum, dtype=torch.float64) for spectrum in update.spectra]
        for values, full in zip(spectra, expected, strict=True):
            known = min(len(values), len(full))  # a matrix may be smaller than r
            torch.testing.assert_close(values[:known], full[:known], rtol=1e-9, atol=1e-12)
            assert float(full[known:].sum()) < 1e-12
            assert float(values[known:].sum()) == 0
        norms = [math.sqrt(sum(float(each.square().sum()) for each in some)) for some in (deltas, weights)]
        assert update.norm == pytest.approx(norms[0], rel=1e-9)
        assert update.weight_norm == pytest.approx(norms[1], rel=1e-9)
        assert update.rank == options.get("rank_pattern", {}).get(layer, R)


def test_updates_of_a_merged_model_are_those_of_the_unmerged_one():
    model = made(Zoo, {"target_modules": ["body.0", "conv"]}, torch.float32)
    before = updates_of_model(model).layers
    merge(model)
    assert updates_of_model(model).layers == before


def test_relative_norms_with_weights_on_disk_are_those_in_the_model(tmp_path: Path):
    model = made(Zoo, {"target_modules": ["body.0", "conv", "embed"]}, torch.float32)
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    save_file(state, tmp_path / "base.safetensors")
    save_adapter(model, tmp_path / "adapter")
    alone, beside = (read_updates(tmp_path / "adapter", base) for base in (None, tmp_path / "base.safetensors"))
    live = updates_of_model(model)
    assert (alone.relative, beside.relative, live.relative) == (False, True, True)
    assert beside.norms(relative=True) == pytest.approx(live.norms(relative=True), rel=1e-6)
    assert alone.norms(relative=False) == pytest.approx(live.norms(relative=False), rel=1e-6)


def test_spectra_of_a_start_that_is_subtracted_have_up_to_twice_as_many_directions():
    model = made(
        lambda: nn.ModuleDict({"wide": nn.Linear(9, 8), "low": nn.Linear(9, 3)}), {"init_lora_weights": "pissa"}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.add_(torch.randn_like(parameter))
    found = updates_of_model(model).layers
    assert {name: len(update.spectra[0]) for name, update in found.items()} == {"wide": 4, "low": 3}


def test_full_rank_is_that_of_all_parts():
    flat, square = (1, 7), (7, 7)
    spectra = ((1.0, 0.0), (1.0, 0.0))
    assert Update(2, spectra, (flat, flat)).has_full_rank
    assert not Update(2, spectra, (flat, square)).has_full_rank


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}], ids=str)
def test_relative_norms_of_attention_on_disk_are_those_in_the_model(tmp_path: Path, options: dict[str, int]):
    model = made(lambda: Attention(**options), {"target_modules": ["mha"]}, torch.float32)
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    save_file(state, tmp_path / "base.safetensors")
    beside = read_updates(checkpoint(model, "adapter"), tmp_path / "base.safetensors")
    assert beside.norms(relative=True) == pytest.approx(updates_of_model(model).norms(relative=True), rel=1e-6)


def test_weights_on_disk_that_are_another_base_are_refused_or_named_in_a_warning(tmp_path: Path):
    model = made(Zoo, {"target_modules": ["body.0"]}, torch.float32)
    save_adapter(model, tmp_path / "adapter")
    state = {name: value + 1 for name, value in model.state_dict().items() if "lora_" not in name}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        LoRAError, match=r"adapter: belongs to another base.* or pass strict_base=False \(--strict-base="
    ):
        read_updates(tmp_path / "adapter", tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match="adapter: belongs to another base"):
        read_updates(tmp_path / "adapter", tmp_path / "other.safetensors", strict_base=False)


def test_norms_of_quantised_weights_are_those_of_their_values():
    pytest.importorskip("bitsandbytes")
    model = adapted("nf4", init_lora_weights=False)
    found = updates_of_model(model).layers
    for name, update in found.items():
        assert update.weight_norm == pytest.approx(
            float(values_of(model.get_submodule(name)).double().norm()), rel=1e-6
        )


def of_a_sharded_model() -> dict[str, Update]:
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    shard_(net)
    return dict(updates_of_model(net).layers)


def of_a_model_with_one_sharded_layer() -> dict[str, Update]:
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    fully_shard(net[0])
    return dict(updates_of_model(net).layers)


@pytest.mark.parametrize("sharded", [of_a_sharded_model, of_a_model_with_one_sharded_layer])
def test_updates_of_a_sharded_model_are_those_of_the_whole_one_on_every_rank(sharded: Callable[[], dict[str, Update]]):
    inject(net := network(), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), seed=3)
    expected = updates_of_model(net).layers
    for found in world().run(sharded):
        assert {name: each.spectra for name, each in found.items()} == {n: e.spectra for n, e in expected.items()}
        for name, each in found.items():
            assert each.weight_norm == pytest.approx(expected[name].weight_norm, rel=1e-9)


# --- two adapters ---


@pytest.mark.parametrize("name", MODELS)
def test_cosines_are_those_of_the_dense_changes(name: str):
    build, options, _ = MODELS[name]
    first, second = made(build, options), made(build, options)
    with torch.no_grad():
        for key, parameter in second.named_parameters():
            if "lora_" in key:
                parameter += 0.5 * torch.randn_like(parameter)
    both = [changes(model) for model in (first, second)]
    updates = [updates_of_model(model) for model in (first, second)]
    found = cosines(*updates)
    for cell, (layer,) in updates[0].cells.items():
        own = [key for key in both[0] if key == layer or key.rpartition(".")[0] == layer]
        left, right = (torch.cat([changed[key][1].flatten() for key in own]) for changed in both)
        assert found[cell] == pytest.approx(float(torch.cosine_similarity(left, right, 0)), abs=1e-9)
    assert cosines(updates[0], updates[0]) == pytest.approx(dict.fromkeys(found, 1.0))


def test_the_cosine_of_several_layers_in_a_cell_is_that_of_all_their_values():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 3) for _ in range(2))}) for _ in range(2)
            )

    models = [made(Blocks, {"target_modules": "all-linear"}) for _ in range(2)]
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if name.endswith("lora_A"):
                parameter += torch.randn_like(parameter)
    first, second = map(updates_of_model, models)
    deltas = [changes(model) for model in models]
    found = cosines(first, second)
    assert list(found) == [("experts", 0), ("experts", 1)]
    for (_, depth), value in found.items():
        left, right = (
            torch.cat([delta.flatten() for name, (_, delta) in each.items() if f"layers.{depth}." in name])
            for each in deltas
        )
        assert value == pytest.approx(float(torch.cosine_similarity(left, right, 0)), abs=1e-9)
        weights = [weight for name, (weight, _) in deltas[0].items() if f"layers.{depth}." in name]
        relative = float(left.norm() / torch.cat([weight.flatten() for weight in weights]).norm())
        assert first.norms(relative=True)["experts", depth] == pytest.approx(relative, rel=1e-9)


def test_a_layer_that_did_not_move_adds_nothing_to_the_cosine_of_its_cell():
    def block() -> nn.Module:
        experts = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 3) for _ in range(2))})
        return nn.ModuleDict({"layers": nn.ModuleList([experts])})

    models = [made(block, {}) for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter("layers.0.experts.1.lora_B").zero_()
    first, second = map(updates_of_model, models)
    one, other = (first.layers[f"layers.0.experts.{i}"].norm for i in range(2))
    assert cosines(first, second) == {("experts", 0): pytest.approx(one / math.hypot(one, other))}


def test_there_is_no_cosine_with_a_zero_update_or_of_other_shapes_or_parts():
    first = updates_of_model(made(lambda: nn.ModuleDict({"a": nn.Linear(3, 6)}), {}))
    zero = made(lambda: nn.ModuleDict({"a": nn.Linear(3, 6)}), {"init_lora_weights": True})
    wide = made(lambda: nn.ModuleDict({"a": nn.Linear(4, 6)}), {})
    parts = made(lambda: nn.ModuleDict({"a": nn.Linear(3, 6)}), {"enable_lora": {"a": [True, False]}})
    other_parts = made(lambda: nn.ModuleDict({"a": nn.Linear(3, 6)}), {"enable_lora": {"a": [False, True]}})
    for one, other in ((first, zero), (first, wide), (first, parts), (updates_of_model(parts), other_parts)):
        (value,) = cosines(one, updates_of_model(other)).values()
        assert math.isnan(value)


# --- the spectra ---

sizes = st.integers(1, 7)


@given(rows=sizes, rank=sizes, columns=sizes, power=st.integers(-120, 120), seed=st.integers(0, 99), zeros=sizes)
def test_singular_values_of_any_product_are_those_of_the_product(
    rows: int, rank: int, columns: int, power: int, seed: int, zeros: int
):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    left[:, zeros:] = 0  # a lower rank than r
    found = singular_values(left * 10.0**power, right)
    expected = torch.linalg.svdvals(left @ right) * 10.0**power
    assert found.shape == (rank,)
    assert (found[:-1] >= found[1:]).all()
    known = min(rank, len(expected))
    torch.testing.assert_close(found[:known], expected[:known], rtol=1e-9, atol=1e-12 * 10.0**power)
    assert float(found[known:].sum()) == 0
    norm = float(torch.linalg.matrix_norm(left @ right)) * 10.0**power
    assert math.hypot(*found.tolist()) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_singular_values_of_what_is_not_finite_are_nan(bad: float):
    left, right = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    left[1, 1] = bad
    assert singular_values(left, right).isnan().all()
    assert singular_values(right.T, left.T).isnan().all()


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12), st.floats(1e-100, 1e100))
def test_half_share_lies_between_half_and_all_and_does_not_depend_on_the_scale(values: list[float], scale: float):
    spectrum = tuple(sorted(values, reverse=True))
    share = half_share(spectrum)
    energies = [value**2 for value in spectrum]
    assert share == pytest.approx(sum(energies[: math.ceil(len(energies) / 2)]) / sum(energies))
    assert 0.5 - 1e-9 <= share <= 1
    assert half_share(tuple(value * scale for value in spectrum)) == pytest.approx(share)


def test_half_share_of_flat_falling_and_zero_spectra():
    assert half_share((1.0, 1.0, 1.0, 1.0)) == 0.5
    assert half_share((2.0, 2.0, 0.0, 0.0)) == 1
    assert math.isnan(half_share((0.0, 0.0)))
    assert math.isnan(half_share((math.nan, math.nan)))
