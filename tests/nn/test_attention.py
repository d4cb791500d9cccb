"""torch's attention and transformer layers read weights without calling layers: the adapter acts all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merged_state_dict,
    save_adapter,
    unmerge,
)
from support.covering import covering
from support.models.layers import DTYPES, same_bits

# torch says so whenever its encoder takes its fast path with a padding mask.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

WIDTH, R, ALPHA = 16, 4, 8.0


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
        self.options = options

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keys, values = (x[..., : self.options[key]] if key in self.options else x for key in ("kdim", "vdim"))
        result: torch.Tensor = self.attention(x, keys, values, key_padding_mask=mask, need_weights=False)[0]
        return result


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)
        with torch.no_grad():
            for parameter in self.parameters():  # the layers are copies of one another
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(x, src_key_padding_mask=mask)
        return result


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    targets: list[str]
    enable: dict[str, list[bool]] | None = None
    without: Sequence[str] = ()


CASES = {
    "out_proj": Case(Attention, ["out_proj"]),
    "in_proj": Case(Attention, ["attention"]),
    "both": Case(Attention, ["attention", "out_proj"]),
    "q and v": Case(Attention, ["attention"], {"attention": [True, False, True]}),
    "own widths": Case(lambda: Attention(kdim=12, vdim=8), ["attention", "out_proj"]),
    "own widths, without out_proj": Case(lambda: Attention(kdim=12, vdim=8), ["attention"], without=["out_proj"]),
    "encoder, feed-forward": Case(Encoder, ["linear1", "linear2"]),
    "encoder, out_proj": Case(Encoder, ["out_proj"]),
    "encoder, all": Case(Encoder, ["linear1", "linear2", "self_attn", "out_proj"]),
    "encoder, norm first": Case(lambda: Encoder(norm_first=True), ["linear2", "out_proj"]),
}


@dataclass
class Subject:
    model: nn.Module
    plain: nn.Module
    x: torch.Tensor
    mask: torch.Tensor

    def run(self, model: nn.Module) -> torch.Tensor:
        """Outputs at the places that are not padding; what stands there depends on torch's path."""
        output: torch.Tensor = model(self.x.to(next(model.parameters()).dtype), self.mask)
        return output[~self.mask]

    def factors(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def on_sum(self, factors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The plain model in that dtype on W + s * B @ A, differentiable in the factors."""
        wide = copy.deepcopy(self.plain).to(dtype)
        state = dict(wide.named_parameters())
        for name in [name for name in factors if "lora_A" in name]:
            module, _, parameter = name.partition("lora_A")
            a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
            layer = self.model.get_submodule(module[:-1])
            weight, delta = (parameter[1:], ALPHA / R * b @ a) if parameter else of_layer(layer, a, b)
            state[module + weight] = (state[module + weight].to(delta.dtype) + delta).to(dtype)
        output: torch.Tensor = functional_call(wide, state, (self.x.to(dtype), self.mask))
        return output[~self.mask]


def of_layer(layer: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The name of a layer's weight, and s * B @ A of it, from the definitions."""
    if not isinstance(layer, nn.MultiheadAttention):
        return "weight", ALPHA / R * b @ a
    if layer.lora.spec.enabled is None:
        return "in_proj_weight", ALPHA / R * b @ a
    parts = [i for i, enabled in enumerate(layer.lora.spec.enabled) if enabled]
    delta = a.new_zeros(3 * WIDTH, WIDTH)
    for i, part_a, part_b in zip(parts, a.split(R), b.split(WIDTH), strict=True):
        delta = delta.index_add(0, torch.arange(i * WIDTH, (i + 1) * WIDTH), ALPHA / R * part_b @ part_a)
    return "in_proj_weight", delta


def make_subject(name: str, dtype: torch.dtype = torch.float32, *, fill: bool = True) -> Subject:
    case = CASES[name]
    plain = case.build().to(dtype).eval()
    model = copy.deepcopy(plain)
    plain.requires_grad_(False)  # as injection does; torch multiplies otherwise where a weight is trained
    options: dict[str, Any] = {"enable_lora": case.enable, "exclude_modules": case.without or None}
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=case.targets, **options))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4:] = True
    subject = Subject(model, plain, torch.randn(3, 5, WIDTH).to(dtype), mask)
    if fill:
        with torch.no_grad():
            for factor in subject.factors().values():
                factor.copy_(0.25 * torch.randn(factor.shape))
    return subject


def assert_as_exact_as_torch(found: Any, torchs: Any, wanted: Any) -> None:
    """No further from float64 than a few times what torch itself is, in this dtype on W + s * B @ A."""
    own = (torchs.double() - wanted).abs().max()
    wide = torch.finfo(torch.float64).eps  # the reference is rounded too, which own does not show in float64
    tolerance = 4 * own + (8 * torch.finfo(found.dtype).eps + 32 * wide) * wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= tolerance


@pytest.mark.parametrize(("name", "dtype"), covering([*CASES], DTYPES, meet=1))
def test_layer_outputs_unmerged_and_merged_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    subject = make_subject(name, dtype)
    factors = {key: value.detach() for key, value in subject.factors().items()}
    with torch.no_grad():
        wanted = subject.on_sum({key: value.double() for key, value in factors.items()}, torch.float64)
        torchs = subject.on_sum(factors, dtype)
        plain = subject.run(subject.plain)
        unmerged = subject.run(subject.model)
        assert_as_exact_as_torch(unmerged, torchs, wanted)
        assert (plain.double() - wanted).abs().max() > 8 * (unmerged.double() - wanted).abs().max()
        merge(subject.model)
        merged = subject.run(subject.model)
        assert_as_exact_as_torch(merged, torchs, wanted)
        twin = copy.deepcopy(subject.plain)
        twin.load_state_dict(merged_state_dict(subject.model))
        assert same_bits(merged, subject.run(twin))
        unmerge(subject.model)
        assert same_bits(subject.run(subject.model), unmerged)
        with disable_adapter(subject.model):
            assert same_bits(subject.run(subject.model), plain)
    assert_as_exact_as_torch(subject.run(subject.model), torchs, wanted)  # with gradients torch goes another way


@pytest.mark.parametrize(("name", "dtype", "training"), covering([*CASES], [*reversed(DTYPES)], [False, True], meet=1))
def test_layer_gradients_agree_with_float64(name: str, dtype: torch.dtype, training: bool) -> None:
    """In evaluation mode too, where torch's fast path would leave the adapter out, gradients enabled or not."""
    subject = make_subject(name, dtype)
    subject.model.train(training)
    factors = subject.factors()
    wide = {key: value.detach().double().requires_grad_() for key, value in factors.items()}
    same = {key: value.detach().clone().requires_grad_() for key, value in factors.items()}
    upstream = torch.randn(int((~subject.mask).sum()), WIDTH).to(dtype)
    subject.run(subject.model).backward(upstream)
    subject.plain.train(training)
    subject.on_sum(wide, torch.float64).backward(upstream.double())
    subject.on_sum(same, dtype).backward(upstream)
    for key, factor in factors.items():
        assert factor.grad is not None
        assert wide[key].grad.abs().max() > 0
        assert_as_exact_as_torch(factor.grad, same[key].grad, wide[key].grad)


@pytest.mark.parametrize("name", CASES)
def test_a_new_adapter_changes_nothing_but_the_path(name: str) -> None:
    """Off its fast path torch rounds otherwise; on the same path the outputs are the same bits."""
    subject = make_subject(name, fill=False)
    for training in (True, False):
        for model in (subject.plain, subject.model):
            model.train(training)
        with torch.no_grad():
            plain, ours = subject.run(subject.plain), subject.run(subject.model)
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
            assert training is False or same_bits(ours, plain)
            merge(subject.model)
            assert same_bits(subject.run(subject.model), plain)
            unmerge(subject.model)


def test_a_part_that_is_not_finite_leaves_every_weight_as_it_was() -> None:
    part = "v"  # the last one that is merged
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 4, kdim=6, vdim=5)})
    inject(model, LoRAConfig(r=R, target_modules=["attention"], init_lora_weights=False))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        model.get_parameter(f"attention.lora_B_{part}_proj_weight").fill_(torch.nan)
    with pytest.raises(LoRAError, match=f"attention.{part}_proj_weight"):
        merge(model)
    assert not is_merged(model)
    assert all(same_bits(model.get_parameter(name), weight) for name, weight in before.items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["attention"]},
        {"target_modules": ["out_proj"], "target_parameters": ["q_proj_weight", "k_proj_weight", "v_proj_weight"]},
    ],
    ids=["the layer", "its parameters"],
)
def test_weights_of_attention_with_own_widths_are_single_parameters(options: dict[str, Any]) -> None:
    model = Attention(kdim=12, vdim=8)
    names = inject(model, LoRAConfig(r=R, **options))
    leaves = ("k_proj_weight", "out_proj", "q_proj_weight", "v_proj_weight")
    assert sorted(names) == [f"attention.{leaf}" for leaf in leaves]
    shapes = {name: tuple(value.shape) for name, value in adapter_state_dict(model).items() if "lora_A" in name}
    assert shapes == {
        "attention.lora_A_q_proj_weight": (R, WIDTH),
        "attention.lora_A_k_proj_weight": (R, 12),
        "attention.lora_A_v_proj_weight": (R, 8),
        "attention.out_proj.lora_A": (R, WIDTH),
    }


def test_the_weights_of_own_widths_alone_are_read_by_peft(tmp_path: Path) -> None:
    subject = make_subject("own widths, without out_proj")
    save_adapter(subject.model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(subject.plain), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(subject.run(theirs), subject.run(subject.model), rtol=0, atol=1e-5)
