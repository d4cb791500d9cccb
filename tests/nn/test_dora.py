"""DoRA: PEFT's numbers, exact before the first step, the norm without B @ A, and merging that gives every bit back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    merged,
    save_adapter,
    summary,
)
from lightning_lora.distributed.flat import Window
from lightning_lora.nn import low_rank
from lightning_lora.nn import output_norms as output_norms_file
from lightning_lora.nn.exact_merge import merge_weight_, merged_weight, unmerge_weight_
from lightning_lora.nn.low_rank import LowRankBlock
from lightning_lora.nn.output_norms import squares_of_windows
from support.covering import covering
from support.devices.places import count
from support.devices.pretend_device import CAN_PRETEND, DEVICE, pretend_device
from support.models.layers import (
    DTYPES,
    Conv1D,
    as_bits,
    make_pieces,
    same_bits,
    scaling_for,
)
from support.models.quantized import network, quantize_
from support.runs.notices import TORCH_NOTICES, quiet_peers

pytestmark = [*quiet_peers, *TORCH_NOTICES]
P = 0.5
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 5, 8)),
    "Linear without bias": (lambda: nn.Linear(8, 6, bias=False), lambda: torch.randn(3, 8)),
    "Conv1D": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 5, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, bias=False), lambda: torch.randn(2, 4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 8, 2), lambda: torch.randn(2, 2, 4, 4, 4)),
    "Embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(11, (4, 5))),
}


def build(kind: str) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(KINDS[kind][0]())


def dora(**options: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 3, "lora_alpha": 4, "target_modules": ["0"], "use_dora": True} | options)


def with_peft(kind: str, **options: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, with the same values."""
    ours, theirs = build(kind), build(kind)
    inject(ours, dora(**options))
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_dora=True, fan_in_fan_out=kind == "Conv1D")
    theirs = peft.get_peft_model(theirs, config)
    torch.testing.assert_close(ours[0].lora_magnitude.flatten(), factors_of(theirs)["lora_magnitude"].flatten())
    spread_(ours)
    with torch.no_grad():
        for name, value in factors_of(theirs).items():
            value.copy_(getattr(ours[0], name).view(value.shape))
    return ours, theirs


def spread_(model: Any) -> None:
    with torch.no_grad():
        model[0].lora_A.normal_(std=0.4)
        model[0].lora_B.normal_(std=0.4)
        model[0].lora_magnitude.mul_(1 + 0.2 * torch.randn_like(model[0].lora_magnitude))


def factors_of(theirs: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in theirs.named_parameters():
        for leaf in ("A", "B", "magnitude"):
            if f"lora_{leaf}" in name or f"lora_embedding_{leaf}" in name:
                found[f"lora_{leaf}"] = parameter
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind: str) -> None:
    ours, theirs = with_peft(kind)
    x = KINDS[kind][1]()
    found, wanted = ours.train()(x), theirs.train()(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    wanted.backward(upstream)
    for name, value in factors_of(theirs).items():
        assert value.grad is not None
        torch.testing.assert_close(getattr(ours[0], name).grad.view(value.shape), value.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), covering([*KINDS], [torch.bfloat16, torch.float16], meet=1))
def test_before_the_first_step_sixteen_bits_are_exact_where_pefts_are_not(kind: str, dtype: torch.dtype) -> None:
    plain = build(kind).to(dtype)
    x = KINDS[kind][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    inject(ours := copy.deepcopy(plain), dora())
    assert ours[0].lora_magnitude.dtype == torch.float32
    assert same_bits(ours(x), plain(x))
    with merged(ours):
        assert same_bits(ours[0].weight, plain[0].weight)
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_dora=True, fan_in_fan_out=kind == "Conv1D")
    theirs = peft.get_peft_model(plain, config)
    exact = plain.base_model.model[0] if hasattr(plain, "base_model") else plain[0]
    weight = exact.base_layer.weight.detach().double().flatten(1)
    norms = weight.norm(dim=0 if kind in ("Conv1D", "Embedding") else 1)
    off = [
        (m.detach().flatten().double() / norms - 1).abs().max()
        for m in (ours[0].lora_magnitude, factors_of(theirs)["lora_magnitude"])
    ]
    assert off[0] < 1e-6 < 1e-4 < off[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_without_weights_is_that_of_the_base_and_then_trains(dtype: torch.dtype) -> None:
    """PEFT's is NaN. The magnitudes have the dtype of W here."""
    model = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    with torch.no_grad():
        model[0].weight[2] = 0
    plain, x = copy.deepcopy(model), torch.randn(5, 8).to(dtype)
    inject(model, dora(autocast_adapter_dtype=False))
    assert model[0].lora_magnitude.dtype == dtype
    assert same_bits(model(x), plain(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    output = model(x)
    assert torch.isfinite(output).all()
    assert (output[:, 2] - plain(x)[:, 2]).abs().max() > 1e-3
    with merged(model):
        torch.testing.assert_close(model(x), output, rtol=4 * EPS[dtype], atol=32 * EPS[dtype])


# --- merging ---


@pytest.mark.parametrize(
    ("dtype", "columns"), covering([torch.float32, torch.bfloat16, torch.float16], [False, True], meet=1)
)
def test_a_scaled_merge_keeps_a_small_part_of_the_weight(dtype: torch.dtype, columns: bool) -> None:
    weight = (0.02 * torch.randn(512, 512)).to(dtype)
    before, pieces = weight.clone(), make_pieces(weight, r=8)
    scale = 0.9 + 0.2 * torch.rand((1, 512) if columns else (512, 1))
    blocks = [LowRankBlock(0, 0, pieces[0].left, pieces[0].right, scale)]
    scaling = scaling_for(before, pieces, 0.01)
    kept = merge_weight_(weight, blocks, scaling)
    assert 0.005 < kept.nbytes() / weight.nbytes < (0.1 if dtype == torch.float32 else 0.15)
    exact = (before.double() + scaling * pieces[0].left.double() @ pieces[0].right.double()) * scale.double()
    assert (as_bits(weight) == as_bits(exact.to(dtype))).double().mean() > 0.9999
    assert same_bits(weight, merged_weight(before, blocks, scaling))
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


# --- states ---


def test_initial_magnitudes_follow_a_new_base_also_without_memory_before_and_trained_ones_stay() -> None:
    base = {"0.weight": torch.randn(6, 8), "0.bias": torch.randn(6)}
    inject(model := build("Linear"), dora())
    with merged(model):
        model.load_state_dict(base)
    torch.testing.assert_close(model[0].lora_magnitude, base["0.weight"].norm(dim=1), rtol=2e-7, atol=0)
    spread_(model)
    trained = model[0].lora_magnitude.detach().clone()
    model.load_state_dict({name: value + 1 for name, value in base.items()})
    assert torch.equal(model[0].lora_magnitude, trained)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    inject(model, dora())
    model.to_empty(device="cpu").load_state_dict(base)
    x = torch.randn(3, 8)
    assert same_bits(model(x), nn.functional.linear(x, base["0.weight"], base["0.bias"]))


@pytest.mark.parametrize(("kind", "init"), [("Linear", "orthogonal"), ("Embedding", False)])
def test_magnitudes_begin_as_the_norm_with_the_initial_adapter(kind: str, init: Any) -> None:
    inject(model := build(kind), dora(r=2, init_lora_weights=init))
    inject(plainly := build(kind), dora(r=2, init_lora_weights=init, use_dora=False))
    x = KINDS[kind][1]()
    torch.testing.assert_close(model(x), plainly(x))


# --- on a device that is not the CPU ---

on_device = pytest.mark.skipif(not CAN_PRETEND, reason="this version of torch cannot pretend a device")
WIDE = {name: kind for name, kind in KINDS.items() if name != "Conv3d"}


@on_device
def test_initial_magnitudes_follow_a_new_base_on_a_device_that_the_model_has_moved_to() -> None:
    base = {"0.weight": torch.randn(64, 256), "0.bias": torch.randn(64)}
    inject(model := nn.Sequential(nn.Linear(256, 64)), dora())
    with pretend_device():
        model.to(DEVICE)
        assert not torch.equal(
            model[0].effective_factors().scale, torch.ones_like(model[0].effective_factors().scale)
        )  # the last bits differ
        model.load_state_dict({name: value.to(DEVICE) for name, value in base.items()})
        torch.testing.assert_close(model[0].lora_magnitude.cpu(), base["0.weight"].norm(dim=1))
        with torch.no_grad():
            model[0].lora_B[3] += 0.1
        trained = model[0].lora_magnitude.detach().clone()
        model.load_state_dict({name: 2 * value.to(DEVICE) for name, value in base.items()})
        assert torch.equal(model[0].lora_magnitude, trained)


CANCELS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(256, 8),
    "Conv1D": lambda: Conv1D(8, 256),
    "Conv1d": lambda: nn.Conv1d(64, 8, 4),
    "Embedding": lambda: nn.Embedding(256, 8),
}


def nearly_cancelled(dtype: torch.dtype, left: float, kind: str) -> tuple[Any, torch.Tensor]:
    """A layer whose norm(V) is `left` of norm(W), as far as the dtype of W can say, and its scale in float64."""
    inject(model := nn.Sequential(CANCELS[kind]().to(dtype)), dora())
    layer = model[0]
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape).to(dtype))
        a, b = (each.double().flatten(1) for each in (layer.lora_A, layer.lora_B))
        delta = layer.lora.spec.scaling * b @ a
        noise = torch.randn(delta.shape, dtype=torch.float64)
        weight = left * delta.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True) - delta
        weight[0] = 0  # beside outputs that cancel, one of which little is left
        layer.weight.copy_((weight.T if layer.layer_info().is_transposed else weight).reshape(layer.weight.shape))
        layer.lora_magnitude.fill_(1.0)
        stored = low_rank.matrix_view(layer.KIND, layer.weight).double()
        return model, 1 / (stored + delta).norm(dim=1)


CANCELLING = {  # allowed relative error of the norm: of V in float32 or wider
    (torch.float64, 1e-3): 1e-12,
    (torch.float64, 1e-6): 1e-9,
    (torch.float32, 1e-3): 2e-5,
    (torch.float32, 1e-6): 2e-2,
    (torch.bfloat16, 1e-3): 1e-4,
    (torch.bfloat16, 1e-6): 1e-4,
    (torch.float16, 1e-3): 1e-4,
    (torch.float16, 1e-6): 1e-4,
}


@on_device
@pytest.mark.parametrize(
    ("kind", "dtype", "left", "piece", "place"),
    [
        *covering([*CANCELS], DTYPES, [1e-3, 1e-6], [2**24, 600], ["cpu", DEVICE], meet=1),
        ("Embedding", torch.float32, 1e-3, 2**24, "cpu"),
        ("Linear", torch.bfloat16, 1e-6, 600, DEVICE),
    ],
)
def test_the_norm_is_right_where_the_adapter_nearly_removes_an_output(
    kind: str, dtype: torch.dtype, left: float, piece: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIECE", "PIECE_ON_CPU"):
        monkeypatch.setattr(output_norms_file, name, piece)
    model, wanted = nearly_cancelled(dtype, left, kind)
    with pretend_device():
        layer = model.to(place)[0]
        found = layer.effective_factors().scale.detach().cpu().double()
        with torch.autocast(place, torch.bfloat16):
            assert torch.equal(layer.effective_factors().scale.detach().cpu().double(), found)
        torch.testing.assert_close(found, wanted, rtol=CANCELLING[dtype, left], atol=0)
        a, b = (each.detach().flatten(1) for each in layer.trained_tensors()[:2])
        stored = layer.weight.detach().flatten(1)
        parts = [
            Window(stored[i : i + 7], slice(i, i + 7), slice(0, stored.shape[1])) for i in range(0, len(stored), 7)
        ]
        squares = squares_of_windows(parts, a, b, layer.lora.spec.scaling, transposed=layer.layer_info().is_transposed)
        torch.testing.assert_close(1 / squares.cpu().sqrt(), wanted, rtol=CANCELLING[dtype, left], atol=0)


LAUNCHES = {torch.float32: 20, torch.bfloat16: 26}  # at most so many over the frozen layer


@on_device
@pytest.mark.parametrize(("kind", "dtype", "dropout"), covering([*WIDE], [*LAUNCHES], [0.0, P], meet=1))
def test_on_a_device_a_step_has_few_launches_no_float64_and_no_wait(
    kind: str, dtype: torch.dtype, dropout: float
) -> None:
    x = KINDS[kind][1]()
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    with pretend_device():
        model, x = build(kind).to(DEVICE, dtype).requires_grad_(False), x.to(DEVICE)

        def step() -> None:
            model.zero_grad()
            output = model(x)
            if output.requires_grad:
                torch.autograd.backward(output, torch.ones_like(output), inputs=wanted)

        wanted = [x] if x.is_floating_point() else []
        floor = count(step) if wanted else count(lambda: model(x))
        inject(model, dora(lora_dropout=dropout))
        wanted += model[0].trained_tensors()
        step()
        more = count(step) - floor
        assert (more.float64, more.waits) == (0, 0), more
        if "Linear" in kind or kind == "Conv1D":
            assert more.launches <= LAUNCHES[dtype] + (12 if dropout else 0), more


@pytest.mark.parametrize(
    ("kind", "dtype", "left", "tolerance"),
    [("Linear", torch.float32, 1e-3, 1e-3), ("Embedding", torch.bfloat16, 1.0, 1e-2)],
)
def test_an_exported_graph_has_no_float64_and_is_right_where_the_adapter_nearly_removes_an_output(
    kind: str, dtype: torch.dtype, left: float, tolerance: float
) -> None:
    model, _ = nearly_cancelled(dtype, left, kind)
    x = torch.randint(256, (5,)) if kind == "Embedding" else torch.randn(5, 256).to(dtype)
    graph = torch.export.export(model, (x,))
    values = [node.meta.get("val") for node in graph.graph.nodes]
    assert not [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.float64]
    found, eager = graph.module()(x), model(x)
    assert (found - eager).double().norm() < tolerance * eager.double().norm()


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["attention"]}, r"'attention': use_dora.*exclude_modules=\['attention'\]"),
        ({"target_modules": ["packed"]}, "'packed': use_dora.*Linear4bit"),
        ({"enable_lora": {"linear": [True, False]}}, "enable_lora must be left out with use_dora"),
        ({"target_parameters": ["weight"]}, "target_parameters must be left out with use_dora"),
    ],
)
def test_what_cannot_have_magnitudes_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    if "packed" in named:
        pytest.importorskip("bitsandbytes")
    packed = quantize_(network(), "nf4")[0] if "packed" in named else nn.Identity()
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "packed": packed, "linear": nn.Linear(8, 6)})
    with pytest.raises(LoRAError, match=named):
        inject(model, dora(**options))
    assert type(model["attention"]) is nn.MultiheadAttention


def test_the_out_proj_of_attention_merges_and_has_no_file_of_pefts(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inject(model, LoRAConfig(r=2, target_modules=["out_proj", "linear1", "linear2"], use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    x = torch.randn(2, 5, 8)
    factored = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), factored)
    with pytest.raises(LoRAError, match=r"'self_attn\.out_proj' belongs to attention"):
        save_adapter(model, tmp_path)


def test_all_linear_leaves_the_out_proj_of_attention_out_and_says_so(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert inject(model, LoRAConfig(r=2, target_modules="all-linear", use_dora=True)) == ["linear1", "linear2"]
    assert "out_proj" in summary(model).left_out[0].reason
    save_adapter(model, tmp_path)


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d])
def test_magnitudes_of_a_convolution_are_read_from_pefts_shape_and_refused_in_another(
    tmp_path: Path, layer: type[nn.Conv1d] | type[nn.Conv2d]
) -> None:
    def convolution() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(layer(3, 5, 3))

    model = convolution()
    inject(model, dora())
    with torch.no_grad():
        model[0].lora_magnitude.mul_(torch.rand(5) + 1)
    save_adapter(model, tmp_path)
    load_adapter(fresh := convolution(), tmp_path)
    assert torch.equal(fresh[0].lora_magnitude, model[0].lora_magnitude)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    (name,) = (each for each in tensors if "magnitude" in each)
    magnitude = tensors.pop(name)
    assert magnitude.shape == (1, 5, *[1] * (model[0].weight.dim() - 2))
    before = {each: value.clone() for each, value in adapter_state_dict(fresh).items()}
    for found in (None, magnitude.transpose(0, 1), magnitude.repeat(2, *[1] * (magnitude.dim() - 1))):
        save_file(tensors | ({} if found is None else {name: found.contiguous()}), file, metadata)
        with pytest.raises(LoRAError, match=r"0\.lora_magnitude"):
            load_adapter(fresh, tmp_path)
    assert all(torch.equal(value, before[each]) for each, value in adapter_state_dict(fresh).items())
