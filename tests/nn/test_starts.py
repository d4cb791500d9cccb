"""Adapters that start from the weight: their initial values, W' = W + s * (B @ A - B0 @ A0), and W unchanged."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    merged,
)
from lightning_lora.nn import linear, low_rank
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.starts import Started, start_factors
from lightning_lora.nn.variant import LayerInfo
from support.covering import covering
from support.models import layers, parameters
from support.models.layers import same_bits

STARTS = ("pissa", "pissa_niter_4", "olora")
KINDS = (
    *("linear, three axes", "activated linear", "transformers Conv1D", "fused, outer parts", "fused Conv1D"),
    *("embedding, padding", "conv1d, groups", "conv2d", "conv2d, depthwise", "conv3d, circular", "conv that pads"),
)
OUT, IN, R, S = 40, 30, 5, 1.5


def decaying(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight whose singular values fall by more than half each, as far apart as subspace iteration needs them."""
    draw = torch.Generator().manual_seed(rows)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64))[0]
    k = min(rows, columns)
    return ((u[:, :k] * 0.4 ** torch.arange(k)) @ v[:k]).to(dtype)


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# --- what they start from ---


@pytest.mark.parametrize(
    ("shape", "init"), covering([(OUT, IN), (IN, OUT), (R, IN), (OUT, R)], ["pissa", "pissa_niter_4"], meet=1)
)
def test_pissa_is_the_best_approximation_with_values_shared_evenly(shape, init):
    weight = decaying(*shape)
    a, b = start_factors(weight, R, S, init, 0)
    best = truncated(weight, R)
    assert a.dtype == b.dtype == torch.float32
    assert (S * (b @ a) - best).norm() < (1e-6 if init == "pissa" else 1e-3) * best.norm()
    values = torch.linalg.svdvals(weight)[:R] / S
    torch.testing.assert_close(a @ a.T, torch.diag(values), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(b.T @ b, torch.diag(values), rtol=1e-3, atol=1e-6)


def test_exact_pissa_is_exact_on_a_weight_without_decay():
    weight = torch.randn(96, 96)
    a, b = start_factors(weight.double(), 8, 1.0, "pissa", 0)
    best = truncated(weight, 8)
    assert (b @ a - best).norm() < 1e-12 * best.norm()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(4, 6, device="meta"), r"needs the values .* or choose another init_lora_weights"),
        (torch.ones(4, 6), "needs r of at most 4 for a weight of 4 by 6, but r is 5"),
        (torch.full((8, 8), torch.nan), "needs finite weights"),
    ],
    ids=["meta", "small", "NaN"],
)
def test_a_weight_that_cannot_be_decomposed_is_refused_by_the_option(weight, said):
    with pytest.raises(LoRAError, match=f"^init_lora_weights='pissa' {said}"):
        start_factors(weight, 5, 1.0, "pissa", 0)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(512, 600), (600, 512)], ids=str)
def test_exact_pissa_of_a_large_weight_is_searched_and_as_exact(shape, monkeypatch):
    """Without all eigenvectors of its smaller side, of which few are wanted."""
    u, v = (torch.linalg.qr(torch.randn(side, 512, dtype=torch.float64))[0] for side in shape)
    weight = ((u * torch.arange(1, 513) ** -0.5) @ v.T).float()
    best = truncated(weight, 4)
    eigh, sides = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sides.append(len(matrix)) or eigh(matrix))
    a, b = start_factors(weight, 4, 1.0, "pissa", 0)
    assert (b @ a - best).norm() < 3e-7 * best.norm()
    assert max(sides) <= 128


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_iterated_pissa_is_torchs_svd_lowrank(shape):
    """Of the same numbers, by which PEFT draws too."""
    weight = torch.randn(shape)
    a, b = start_factors(weight, R, 1.0, "pissa_niter_2", 7)
    torch.manual_seed(7)
    u, s, v = torch.svd_lowrank(weight, R, niter=2)
    torch.testing.assert_close(b @ a, (u * s) @ v.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_olora_is_the_first_columns_of_q_and_rows_of_r(shape):
    weight = torch.randn(shape)
    a, b = start_factors(weight, R, S, "olora", 0)
    q, r = torch.linalg.qr(weight.double())
    torch.testing.assert_close((b @ a).double(), q[:, :R] @ r[:R], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(R), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", STARTS)
def test_weights_of_low_rank_or_zero_give_finite_factors(init):
    for weight in (torch.zeros(8, 6), truncated(torch.randn(8, 6), 2).float(), torch.ones(6, 8)):
        a, b = start_factors(weight, 4, S, init, 0)
        assert a.isfinite().all()
        assert b.isfinite().all()
        if init != "olora":  # whose first columns need not span all
            torch.testing.assert_close(S * (b @ a), weight, rtol=1e-4, atol=1e-5)


def test_starts_do_not_advance_the_random_stream_and_repeat():
    weight = torch.randn(OUT, IN)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for init in STARTS:
        one, other = (start_factors(weight, R, S, init, 3) for _ in range(2))
        assert all(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), state)


# --- every kind ---

SHAPES = {"Conv": (8, 2, 2, 1), "GroupedConv": (8, 2, 2), "Experts": (3, 8, 4), "TransposedExperts": (3, 8, 4)}


def started(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    info = LayerInfo("net.up", kind, weight.shape, 4, S, init="pissa")
    stored = Started().start(info, lambda: weight)
    return {leaf: stored[leaf] for leaf in ("lora_A", "lora_B")}


@pytest.mark.parametrize("kind", low_rank.STARTED)
def test_at_full_rank_the_factors_of_every_kind_that_can_be_started_are_the_weight(kind):
    weight = torch.randn(SHAPES.get(kind, (8, 4)))
    a, b = started(kind, weight).values()
    matrix = weight.reshape(-1, low_rank.columns_of(kind, weight.shape))
    found = S * low_rank.dense_delta(low_rank.low_rank_blocks(kind, weight.shape, a, b), matrix.shape)
    torch.testing.assert_close(found, matrix, rtol=1e-4, atol=1e-5)


def test_a_kind_whose_factors_are_in_another_order_is_refused(monkeypatch):
    """A transposed convolution: W (in, out, k, k), A (r, in, 1, 1), B (out, r, k, k)."""
    before, kind = low_rank.factor_shapes, "ConvTranspose"

    def factor_shapes(of: str, shape: torch.Size, rank: int, *others: Any) -> Any:
        inputs, out, *kernel = shape if of == kind else (0, 0)
        return ((rank, inputs, 1, 1), (out, rank, *kernel)) if of == kind else before(of, shape, rank, *others)

    monkeypatch.setattr(low_rank, "TRANSPOSED", (*low_rank.TRANSPOSED, kind))
    monkeypatch.setattr(low_rank, "factor_shapes", factor_shapes)
    with pytest.raises(LoRAError, match=r"'net.up': init_lora_weights='pissa'.*'ConvTranspose'.*exclude_modules"):
        started(kind, torch.randn(4, 6, 2, 2))


# --- every layer ---


def inject_start(model: nn.Module, init: str = "pissa", **options: Any) -> nn.Module:
    inject(model, LoRAConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": init} | options))
    return model


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 7))


def move_(model: nn.Module, by: float = 0.1) -> nn.Module:
    """Train, in a way: another A and B, and A0 and B0 as they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape))
    return model


def without_start(subject: layers.Subject) -> layers.Subject:
    """The subject with W - s * B0 @ A0 in float64 in place of W, for a reference that adds s * B @ A."""
    plain, layer = copy.deepcopy(subject.plain).double(), subject.layer
    start = layers.matrix(
        subject.plain.layer, layer.lora_start_A.double(), layer.lora_start_B.double(), subject.case.parts
    )
    with torch.no_grad():
        plain.layer.weight -= layers.ALPHA / layers.R * start.view(plain.layer.weight.shape)
    return layers.Subject(subject.model, plain, subject.x, subject.case)


@pytest.mark.parametrize(("name", "init"), covering(KINDS, ["pissa", "olora"], meet=1))
def test_outputs_and_gradients_unmerged_and_merged_agree_with_float64(name: str, init: str):
    subject = layers.make_subject(name, torch.float64, fill=False, init_lora_weights=init)
    plain = subject.plain(subject.x)
    assert same_bits(subject.model(subject.x), plain)
    with merged(subject.model):
        assert same_bits(subject.model(subject.x), plain)
        assert same_bits(subject.layer.weight, subject.plain.layer.weight)
    move_(subject.model)
    factors = [subject.layer.lora_A, subject.layer.lora_B]
    wide, upstream = [factor.detach().clone().requires_grad_() for factor in factors], torch.randn(plain.shape)
    wanted, found = without_start(subject).reference(*wide), subject.model(subject.x)
    assert not torch.allclose(plain, wanted)
    torch.testing.assert_close(found, wanted)
    found.backward(upstream.double())
    wanted.backward(upstream.double())
    for factor, reference in zip(factors, wide, strict=True):
        torch.testing.assert_close(factor.grad, reference.grad)
    assert subject.layer.lora_start_A.grad is subject.layer.lora_start_B.grad is None
    with merged(subject.model):
        torch.testing.assert_close(subject.model(subject.x), wanted)
    assert same_bits(subject.layer.weight, subject.plain.layer.weight)


@pytest.mark.parametrize("name", ["lstm", "transposed experts", "matrix"])
def test_single_parameters_agree_with_float64(name: str):
    subject = parameters.make_subject(name, torch.float64, fill=False, init_lora_weights="pissa")
    assert torch.equal(subject.model(subject.x), subject.plain(subject.x))
    move_(subject.model)
    factors = subject.factors()
    start = {key.replace("_start", ""): value for key, value in factors.items() if "_start" in key}
    reference = copy.copy(subject)
    reference.plain = copy.deepcopy(subject.plain)
    with torch.no_grad():
        for weight in adapted_layers(subject.model):
            module, _, leaf = weight.rpartition(".")
            a, b = (start[f"{module}.lora_{factor}_{leaf}"] for factor in "AB")
            parameter = reference.plain.get_parameter(weight)
            parameter -= parameters.ALPHA / parameters.R * parameters.delta(a, b, parameter, subject.is_transposed)
    wanted = reference.reference(factors)
    torch.testing.assert_close(subject.model(subject.x), wanted)
    with merged(subject.model):
        torch.testing.assert_close(subject.model(subject.x), wanted)


def test_each_part_and_each_expert_starts_from_its_own_weight():
    fused = layers.make_subject("fused, outer parts", torch.float64, fill=False, init_lora_weights="pissa").layer
    stack = parameters.make_subject("transposed experts", torch.float64, fill=False, init_lora_weights="pissa").model
    experts = stack.inner
    found = [
        layers.ALPHA / layers.R * (b @ a) for a, b in zip(fused.lora_A.split(3), fused.lora_B.split(4), strict=True)
    ]
    wanted = [truncated(part, 3) for part in (fused.weight[:4], fused.weight[8:])]
    factors = zip(experts.lora_A_down_proj.chunk(4), experts.lora_B_down_proj.chunk(4), strict=True)
    found += [parameters.ALPHA / parameters.R * (b @ a).T for a, b in factors]
    wanted += [truncated(part, 3) for part in experts.down_proj]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


# --- W stays ---


@pytest.mark.parametrize(
    ("init", "dtype", "keep"), covering(STARTS, [torch.bfloat16, torch.float16, torch.float32], [True, False], meet=1)
)
def test_the_first_step_changes_no_bit_in_any_dtype(init, dtype, keep):
    """PEFT's bf16 base has rounded twice here, and is 0.2 % off."""
    plain = net().to(dtype)
    model = inject_start(copy.deepcopy(plain), init, autocast_adapter_dtype=keep)
    x = torch.randn(5, 8).to(dtype)
    assert same_bits(model(x), plain(x))
    with merged(model):
        assert same_bits(model[0].weight, plain[0].weight)
        assert same_bits(model(x), plain(x))
    assert model[0].lora_start_A.dtype == model[0].lora_A.dtype == (torch.float32 if keep else dtype)


@pytest.mark.parametrize("where", ["cpu", "a device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_first_step_changes_no_bit_of_the_inputs_gradient_and_trains_a_and_b(dtype, where, a_device):
    plain = net()[0].to(dtype).requires_grad_(False)
    model = inject_start(nn.Sequential(copy.deepcopy(plain)))
    x, g = torch.randn(5, 8).to(dtype), torch.randn(5, 6).to(dtype)
    found = []
    with nullcontext("cpu") if where == "cpu" else a_device() as device:
        for module in (plain.to(device), model.to(device)):
            given = x.to(device).requires_grad_()
            output = module(given)
            output.backward(g.to(device))
            found.append((output.detach().cpu(), given.grad.cpu()))
        assert all(factor.grad.abs().max() > 0 for factor in model[0].trained_tensors())
    (wanted, of_input), (output, gradient) = found
    # A - A0 = 0 meets B0, and B - B0 = 0 meets A: the sum that is added is exactly zero.
    assert torch.equal(output, wanted)
    assert torch.equal(gradient, of_input)


def test_a_small_change_is_not_lost_to_rounding_in_16_bits():
    """B @ A and B0 @ A0 are large and nearly equal: in 16 bits their difference would be noise."""
    model = inject_start(net().bfloat16())
    move_(model, 1e-3)
    layer, x = model[0], torch.randn(64, 8).bfloat16()
    delta = 1.5 * (layer.lora_B @ layer.lora_A - layer.lora_start_B @ layer.lora_start_A)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    found, wanted = layer(x).float(), x.float() @ delta.T
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(("frozen", "dropout"), covering(["", "lora_A", "lora_B"], [0.0, 0.5], meet=1))
def test_a_training_step_has_the_gradients_of_the_operations_one_by_one(frozen, dropout, monkeypatch):
    model = inject_start(net().double(), lora_dropout=dropout, bias="lora_only")
    move_(model)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return torch.autograd.grad(model(x).square().sum(), sources)

    def one_by_one(layer: Any, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        a, b, start_a, start_b = layer.stored().values()
        seen, scaling = layer.dropped(x.view(-1, x.shape[-1]))
        ran.append(True)
        return layer.base_forward(x) + scaling * (seen @ (b @ a - start_b @ start_a).T).view(*x.shape[:-1], -1)

    found, ran = gradients(), []
    monkeypatch.setattr(linear.LoRALinear, "sum_forward", one_by_one)
    for gradient, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert ran


@pytest.mark.parametrize("unfrozen", [False, True])
def test_weight_decay_and_steps_never_change_the_start(unfrozen):
    model = inject_start(net())
    model.requires_grad_(True) if unfrozen else None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = ("lora_A", "lora_B", *(("weight", "bias") if unfrozen else ()))
    assert changed == {f"{i}.{name}" for i in (0, 2) for name in expected}


@pytest.mark.slow
def test_dropout_drops_what_the_adapter_adds():
    """With all of it dropped the base's output is left, as at the first step; PEFT drops what it took out of W too."""
    plain, x = net()[0], torch.randn(50, 8)
    model = inject_start(nn.Sequential(copy.deepcopy(plain)), lora_dropout=0.5).train()
    assert torch.equal(model(x), plain(x))
    move_(model)
    outputs = torch.stack([model(x) for _ in range(2000)])
    assert outputs.std(0).min() > 0
    torch.testing.assert_close(outputs.mean(0), model.eval()(x), rtol=0.1, atol=0.05)


# --- refusals ---


def test_a_rank_above_the_weights_sides_and_weights_without_values_are_refused_by_name():
    model = net()
    with pytest.raises(LoRAError, match=r"'2': init_lora_weights='pissa' needs r of at most 6 .* but r is 8"):
        inject(model, LoRAConfig(r=8, rank_pattern={"^0": 4}, init_lora_weights="pissa"))
    assert not adapted_layers(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in net().named_parameters()}
    with torch.device("meta"):
        model = net()
    with pytest.raises(LoRAError, match=r"'0': .*on the meta device; inject after the weights are loaded"):
        inject_start(model)
