"""torch's attention and transformer layers read weights without calling layers: the adapter acts all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, disable_adapter, inject, merge, merged_state_dict, unload, unmerge
from lightning_lora.errors import NonFiniteError
from support.layers import DTYPES, same_bits
from support.recorders import Operators

# torch says so whenever its encoder takes its fast path with a padding mask.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

WIDTH, R, ALPHA = 16, 4, 8.0
FAST = "aten._transformer_encoder_layer_fwd.default"


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


CASES = {
    "out_proj": Case(Attention, ["out_proj"]),
    "in_proj": Case(Attention, ["attention"]),
    "both": Case(Attention, ["attention", "out_proj"]),
    "q and v": Case(Attention, ["attention"], {"attention": [True, False, True]}),
    "own widths": Case(lambda: Attention(kdim=12, vdim=8), ["attention", "out_proj"]),
    "own widths, k and v": Case(lambda: Attention(kdim=12, vdim=8), ["attention"], {"attention": [False, True, True]}),
    "encoder, feed-forward": Case(Encoder, ["linear1", "linear2"]),
    "encoder, out_proj": Case(Encoder, ["out_proj"]),
    "encoder, all": Case(Encoder, ["linear1", "linear2", "self_attn", "out_proj"]),
    "encoder, norm first": Case(lambda: Encoder(norm_first=True), ["linear2", "out_proj"]),
}
ENCODERS = [name for name in CASES if name.startswith("encoder")]


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
        for name in [name.removesuffix("lora_A") for name in factors if name.endswith("lora_A")]:
            a, b = factors[name + "lora_A"], factors[name + "lora_B"]
            for weight, delta in deltas(self.model.get_submodule(name[:-1]), a, b):
                value = state[name + weight]
                state[name + weight] = (value.to(delta.dtype) + delta).to(dtype)
        output: torch.Tensor = functional_call(wide, state, (self.x.to(dtype), self.mask))
        return output[~self.mask]


def deltas(layer: Any, a: torch.Tensor, b: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """s * B @ A of each weight, from the definitions."""
    if not isinstance(layer, nn.MultiheadAttention):
        return [("weight", ALPHA / R * b @ a)]
    parts = [i for i, enabled in enumerate(layer.lora.spec.enabled or (True, True, True)) if enabled]
    names = [f"{letter}_proj_weight" for letter in "qkv"]
    if not layer._qkv_same_embed_dim:
        widths = [getattr(layer, names[i]).shape[1] for i in parts]
        pairs = zip(parts, a.split(widths, dim=1), b.split(WIDTH), strict=True)
        return [(names[i], ALPHA / R * part_b @ part_a) for i, part_a, part_b in pairs]
    if layer.lora.spec.enabled is None:
        return [("in_proj_weight", ALPHA / R * b @ a)]
    delta = a.new_zeros(3 * WIDTH, WIDTH)
    for i, part_a, part_b in zip(parts, a.split(R), b.split(WIDTH), strict=True):
        delta = delta.index_add(0, torch.arange(i * WIDTH, (i + 1) * WIDTH), ALPHA / R * part_b @ part_a)
    return [("in_proj_weight", delta)]


def make_subject(name: str, dtype: torch.dtype = torch.float32, *, fill: bool = True) -> Subject:
    case = CASES[name]
    plain = case.build().to(dtype).eval()
    model = copy.deepcopy(plain)
    plain.requires_grad_(False)  # as injection does; torch multiplies otherwise where a weight is trained
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=case.targets, enable_lora=case.enable))
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
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
def test_merged_runs_just_the_operators_of_the_plain_model(name: str) -> None:
    subject = make_subject(name)

    def operators(model: nn.Module) -> list[str]:
        with torch.no_grad(), Operators() as operators:
            model(subject.x, subject.mask)
        return operators.seen

    wanted, unmerged = operators(subject.plain), operators(subject.model)
    assert wanted != unmerged
    assert FAST not in unmerged
    for _ in range(2):
        merge(subject.model)
        assert operators(subject.model) == wanted
        unmerge(subject.model)
        assert operators(subject.model) == unmerged
    unload(subject.model)
    assert operators(subject.model.requires_grad_(False)) == wanted


def test_the_plain_encoder_takes_the_fast_path() -> None:
    """Without which the tests above would show nothing."""
    for name in ENCODERS:
        subject = make_subject(name)
        with torch.no_grad(), Operators() as operators:
            subject.plain(subject.x, subject.mask)
        assert FAST in operators.seen


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


@pytest.mark.parametrize("state", [merge, unmerge])
@pytest.mark.parametrize("name", ["both", "own widths", "encoder, all"])
def test_copy_of_a_layer_is_equal_and_independent(name: str, state: Callable[..., None]) -> None:
    subject = make_subject(name)
    state(subject.model)
    with torch.no_grad():
        wanted = subject.run(subject.model)
        twin = copy.deepcopy(subject.model)
        unload(subject.model)
        assert same_bits(subject.run(subject.model.requires_grad_(False)), subject.run(subject.plain))
        assert same_bits(subject.run(twin), wanted)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_a_part_that_is_not_finite_leaves_every_weight_as_it_was(part: int) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 4, kdim=6, vdim=5)})
    inject(model, LoRAConfig(r=R, target_modules=["attention"], init_lora_weights=False))
    layer: Any = model["attention"]
    weights = {name: weight.detach().clone() for name, weight in layer.adapted_weights().items()}
    with torch.no_grad():
        layer.lora_B[part * WIDTH : (part + 1) * WIDTH] = torch.nan
    with pytest.raises(NonFiniteError):
        layer.merge_(copy=False)
    assert not layer.lora.records
    assert len(weights) == 3
    assert all(same_bits(layer.adapted_weights()[name], weight) for name, weight in weights.items())
