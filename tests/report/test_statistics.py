"""adapter_stats against float64 references that build B @ A, take its SVD, and differentiate with torch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import support.models.parameters as single
import support.models.token_rows as tables
from lightning_lora import LoRAConfig, adapter_stats, inject, merged, summary
from lightning_lora.names import group_of
from lightning_lora.nn import linear
from lightning_lora.nn.adapted_weights import AdaptedWeights
from lightning_lora.report.statistics import GroupStats
from support.models.layers import ALPHA, R, make_subject, matrix
from support.models.networks import ZOO_LAYERS, Zoo, randomise_, state_bits, zoo_config
from support.models.quantized import adapted, values_of

LAYERS = [
    *("linear", "transformers Conv1D", "fused, outer parts", "fused Conv1D", "embedding", "conv2d, groups", "conv3d"),
]
Deltas = Sequence[torch.Tensor]  # s * B @ A of each matrix of a group, in float64


def expected(now: Deltas, before: Deltas, weights: Deltas) -> tuple[float, float, float]:
    """Norm, effective rank and cosine, from matrices that were built."""
    vectors = [torch.cat([delta.flatten() for delta in deltas]) for deltas in (now, before)]
    norm = vectors[0].norm() / torch.cat([weight.detach().double().flatten() for weight in weights]).norm()
    entropies = [torch.distributions.Categorical(torch.linalg.svdvals(delta)).entropy() for delta in now]
    cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0)
    return float(norm), float(torch.stack(entropies).exp().mean()), float(cosine)


def found(stats: GroupStats) -> tuple[Any, Any, Any]:
    return stats.norm, stats.rank, stats.cosine


def refill_(model: nn.Module) -> None:
    """Move the factors, but not far."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_statistics_are_those_of_the_built_update(name: str):
    subject = make_subject(name)

    def deltas() -> Deltas:
        a, b = subject.layer.lora_A.detach().double(), subject.layer.lora_B.detach().double()
        parts = subject.case.parts
        if not parts:
            return [ALPHA / R * matrix(subject.plain.layer, a, b, None)]
        whole = ALPHA / R * matrix(subject.plain.layer, a, b, parts)
        pieces = whole.chunk(len(parts), dim=1 if "Conv1D" in name else 0)
        return [piece for piece, part in zip(pieces, parts, strict=True) if part]

    first, before = adapter_stats(subject.model), deltas()
    refill_(subject.model)
    second = adapter_stats(subject.model, first)
    (group,) = second.groups.values()
    assert group.layers == 1
    assert found(group) == pytest.approx(expected(deltas(), before, [subject.plain.layer.weight]), rel=1e-6)
    assert abs(group.cosine or 1) < 0.9999
    assert first.groups["layer"].cosine is None


@pytest.mark.parametrize("name", ["lstm", "experts", "transposed experts", "matrix"])
def test_statistics_of_single_parameters_are_those_of_the_built_updates(name: str):
    subject = single.make_subject(name)
    names = [n.replace("lora_A_", "") for n in subject.factors() if "lora_A_" in n]

    def deltas(parameter: str) -> Deltas:
        module, _, leaf = parameter.rpartition(".")
        a, b = (subject.factors()[f"{module}.lora_{factor}_{leaf}"].double() for factor in "AB")
        whole = single.delta(a, b, subject.plain.get_parameter(parameter), subject.is_transposed)
        return [single.ALPHA / single.R * part for part in (whole if whole.dim() == 3 else [whole])]

    first, before = adapter_stats(subject.model), {n: deltas(n) for n in names}
    refill_(subject.model)
    second = adapter_stats(subject.model, first)
    assert len(second.groups) == len(names) > 0
    for n in names:
        reference = expected(deltas(n), before[n], [subject.plain.get_parameter(n)])
        assert found(second.groups[group_of(n)]) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_have_a_norm_a_gradient_and_a_cosine_and_no_rank(tied: bool):
    subject = tables.make_subject("tied" if tied else "embedding", fill=False)
    first = adapter_stats(subject.model)
    assert (first.groups["emb"].norm, first.groups["emb"].cosine) == (0, None)
    weight = subject.plain.emb.weight.detach().double()

    def change() -> torch.Tensor:
        return subject.rows()["emb"].double() - weight[list(tables.ROWS)]

    tables.fill_rows_(subject.model)
    second, before = adapter_stats(subject.model, first), change()
    assert second.groups["emb"].cosine is None  # the first is zero
    tables.fill_rows_(subject.model)
    subject.model(subject.tokens).square().sum().backward()
    for merge_it in (False, True):
        with merged(subject.model) if merge_it else torch.no_grad():
            group = adapter_stats(subject.model, second).groups["emb"]
        assert group.rank is None
        assert group.norm == pytest.approx(float(change().norm() / weight.norm()), rel=1e-6)
        assert group.cosine == pytest.approx(
            float((change() * before).sum() / change().norm() / before.norm()), rel=1e-6
        )
        assert group.gradients == {"rows": pytest.approx(float(subject.model.emb.lora_rows.grad.norm()), rel=1e-6)}


def blocks() -> nn.ModuleDict:
    layers = {f"{i}": nn.ModuleDict({"q": nn.Linear(8, 6), "up": nn.Linear(8, 8 + 2 * i)}) for i in range(2)}
    inject(model := nn.ModuleDict(layers), LoRAConfig(r=3, lora_alpha=6, alpha_pattern={"1.q": 3}))
    randomise_(model, 1)
    return model


def dense(layer: Any) -> torch.Tensor:
    delta: torch.Tensor = layer.lora.spec.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return delta


def test_group_takes_all_its_layers_as_one_vector_and_the_mean_of_their_ranks():
    model: Any = blocks()
    first, before = adapter_stats(model), {name: [dense(model[i][name]) for i in "01"] for name in ("q", "up")}
    refill_(model)
    second = adapter_stats(model, first)
    assert list(second.groups) == list(dict.fromkeys(g.name for g in summary(model).groups)) == ["q", "up"]
    for name, group in second.groups.items():
        layers = [model[i][name] for i in "01"]
        reference = expected([dense(layer) for layer in layers], before[name], [layer.weight for layer in layers])
        assert found(group) == pytest.approx(reference, rel=1e-6)
        assert group.layers == 2


def test_gradient_norms_are_those_that_torch_computes_for_the_built_update():
    subject = make_subject("linear")
    subject.model(subject.x).square().sum().backward()
    a, b = (factor.detach().double().requires_grad_() for factor in (subject.layer.lora_A, subject.layer.lora_B))
    subject.reference(a, b).square().sum().backward()
    gradients = adapter_stats(subject.model).groups["layer"].gradients
    assert gradients == pytest.approx({"A": float(a.grad.norm()), "B": float(b.grad.norm())}, rel=1e-5)
    model: Any = blocks()
    assert adapter_stats(model).groups["q"].gradients == {}
    for i in "01":
        model[i].q(torch.ones(8)).sum().backward()
    together = math.hypot(*(float(model[i].q.lora_A.grad.norm()) for i in "01"))
    assert adapter_stats(model).groups["q"].gradients["A"] == pytest.approx(together, rel=1e-6)
    assert "grad_A" not in adapter_stats(model).groups["up"].to_dict()


def test_update_of_zero_has_rank_zero_and_no_cosine():
    inject(model := Zoo(), zoo_config())
    for group in adapter_stats(model, adapter_stats(model)).groups.values():
        assert (group.norm, group.rank, group.cosine) == (0, 0, None)
        assert set(group.to_dict()) == {"norm", "rank"}


def test_nan_in_one_factor_is_told_and_leaves_other_groups_alone():
    model: Any = blocks()
    first = adapter_stats(model)
    with torch.no_grad():
        model["0"].q.lora_B[0, 0] = math.nan
    second = adapter_stats(model, first)
    assert all(map(math.isnan, found(second.groups["q"])))
    assert second.groups["up"].norm == first.groups["up"].norm
    assert math.isnan(adapter_stats(model, second).groups["q"].norm)


def test_merged_model_has_the_statistics_of_the_unmerged_one_and_neither_is_changed():
    inject(model := Zoo().to(torch.bfloat16), zoo_config(init_lora_weights=False))
    before = state_bits(model)
    unmerged = adapter_stats(model)
    with merged(model):
        assert adapter_stats(model) == unmerged
        assert adapter_stats(model, unmerged).groups["conv"].norm == unmerged.groups["conv"].norm
    with torch.inference_mode():
        assert adapter_stats(model) == unmerged
    assert state_bits(model) == before
    assert {"embed", "conv", "body"} == set(unmerged.groups)
    assert sum(group.layers for group in unmerged.groups.values()) == len(ZOO_LAYERS)


def test_quantized_weight_is_dequantized_once(monkeypatch: pytest.MonkeyPatch):
    model = adapted("nf4 nested")
    calls: list[Any] = []
    dequantize = linear.dequantize
    monkeypatch.setattr(linear, "dequantize", lambda *args: calls.append(args) or dequantize(*args))
    first = adapter_stats(model)
    assert len(calls) == 3
    with merged(model):
        second = adapter_stats(model, first)
    assert len(calls) == 3
    weights = [values_of(model[i]) for i in (0, 2, 4)]
    deltas = [dense(model[i]) for i in (0, 2, 4)]
    for stats in (first, second):
        assert stats.groups["layers"].norm == pytest.approx(expected(deltas, deltas, weights)[0], rel=1e-5)


def test_norm_of_a_weight_is_computed_again_only_when_it_may_have_changed(monkeypatch: pytest.MonkeyPatch):
    model: Any = blocks()
    calls: list[str] = []
    base_values = AdaptedWeights.base_values
    monkeypatch.setattr(AdaptedWeights, "base_values", lambda self: calls.append(self.lora.name) or base_values(self))
    stats = adapter_stats(model)

    def next_calls() -> list[str]:
        nonlocal stats
        calls.clear()
        stats, made = adapter_stats(model, stats), list(calls)
        assert [g.norm for g in stats.groups.values()] == [g.norm for g in adapter_stats(model).groups.values()]
        return made

    assert next_calls() == []
    with torch.no_grad():
        model["0"].q.weight.mul_(2)  # as load_state_dict does
    assert next_calls() == ["0.q"]
    model["1"].q.weight = nn.Parameter(torch.randn(6, 8), requires_grad=False)
    assert next_calls() == ["1.q"]
    torch.utils.swap_tensors(model["1"].q.weight, nn.Parameter(torch.randn(6, 8), requires_grad=False))
    assert next_calls() == ["1.q"]
    model["0"].up.weight.requires_grad_()
    assert next_calls() == next_calls() == ["0.up"]
    model["0"].up.weight.requires_grad_(False)  # what trained it may have been a step that torch does not count
    assert next_calls() == ["0.up"]
    assert next_calls() == []


def test_statistics_can_be_pickled_without_what_they_are_compared_with():
    stats = adapter_stats(blocks())
    again = pickle.loads(pickle.dumps(stats))
    assert again == stats
    assert stats.snapshots
    assert not again.snapshots
    assert "tensor" not in repr(stats)


def test_cosine_leaves_out_a_layer_of_another_rank_than_before():
    def build(ranks: dict[str, int]) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        inject(model, LoRAConfig(r=2, rank_pattern=ranks, init_lora_weights=False), seed=1)
        return model

    before = adapter_stats(build({}))
    found = adapter_stats(build({"1": 3}), before).groups["layers"].cosine
    assert found == pytest.approx(1)  # of layer 0, which is as it was
