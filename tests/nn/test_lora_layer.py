"""Every kind of adapted layer against a float64 reference, and against the plain layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, disable_adapter, inject, merge, merged, unload, unmerge
from lightning_lora.nn import layer_kinds, lora_layer, low_rank
from lightning_lora.nn.lora_layer import LoRALayer
from support.covering import covering
from support.models.layers import ALPHA, CASES, DTYPES, R, Subject, UserLinear, make_subject, rounding, same_bits
from support.models.token_rows import Scaled
from support.runs.recorders import operators

SOME = [  # one of each kind of layer and forward
    *("linear, one vector", "user's linear", "activated linear", "linear of another library", "transformers Conv1D"),
    *("fused, outer parts", "fused Conv1D", "embedding, padding", "embedding, by frequency", "conv1d, unbatched"),
    *("conv2d, circular", "conv2d, depthwise", "conv3d, groups", "conv that pads", "conv with an inner forward"),
    *("dora, linear", "dora, embedding, padding", "dora, conv2d"),
]


def assert_agrees(found: torch.Tensor, subject: Subject) -> None:
    """`found` is right, and the plain output would not pass for it."""
    a, b = subject.layer.lora_A.detach(), subject.layer.lora_B.detach()
    wanted = subject.reference(a, b)
    tolerance = rounding(found.dtype, subject.reference(a, b, magnitudes=True))
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= tolerance).all()
    assert not ((subject.plain(subject.x).double() - wanted).abs() <= tolerance).all()


@pytest.mark.core
@pytest.mark.parametrize(("name", "dtype"), covering([*CASES], DTYPES, meet=1))
def test_layer_outputs_unmerged_and_merged_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    subject = make_subject(name, dtype)
    output = subject.model(subject.x)
    assert output.dtype == dtype
    assert_agrees(output, subject)
    with torch.no_grad():
        assert torch.equal(subject.model(subject.x), output)
    merge(subject.model)
    assert_agrees(subject.model(subject.x), subject)
    unmerge(subject.model)
    assert torch.equal(subject.model(subject.x), output)
    with disable_adapter(subject.model):
        assert same_bits(subject.model(subject.x), subject.plain(subject.x))


@pytest.mark.parametrize(("name", "dtype"), covering([*CASES], [*reversed(DTYPES)], meet=1))
def test_layer_gradients_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    """Those of the plain layer with W + s * B @ A for its weight."""
    subject = make_subject(name, dtype)
    factors = [subject.layer.lora_A, subject.layer.lora_B]
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    sizes = [factor.detach().double().abs().requires_grad_() for factor in factors]
    upstream = torch.randn(subject.reference(*wide).shape).to(dtype)
    subject.model(subject.x).backward(upstream)
    subject.reference(*wide).backward(upstream.double())
    subject.reference(*sizes, magnitudes=True).backward(upstream.double().abs())
    for factor, reference, size in zip(factors, wide, sizes, strict=True):
        assert factor.grad is not None
        assert factor.grad.layout == torch.strided
        assert ((factor.grad.double() - reference.grad).abs() <= rounding(dtype, size.grad)).all()
    assert all(p.grad is None for name, p in subject.model.named_parameters() if "lora_" not in name)


@pytest.mark.core
@pytest.mark.parametrize(("name", "dtype", "training"), covering(SOME, DTYPES, [False, True], meet=1))
def test_new_adapter_on_a_layer_changes_no_bit_of_the_output(name: str, dtype: torch.dtype, training: bool) -> None:
    subject = make_subject(name, dtype, fill=False)
    wanted = subject.plain(subject.x)
    assert torch.equal(subject.model.train(training)(subject.x), wanted)
    merge(subject.model)
    assert torch.equal(subject.model(subject.x), wanted)


@pytest.mark.parametrize("name", SOME)
def test_adapted_layer_keeps_class_and_names_shows_its_rank_and_takes_its_input_by_keyword(name: str) -> None:
    subject = make_subject(name)
    assert isinstance(subject.layer, type(subject.plain.layer))
    shown = [subject.plain.layer.extra_repr(), f"r={R}, alpha={ALPHA:g}"]
    assert subject.layer.extra_repr() == ", ".join(filter(None, shown))
    base = {name: p for name, p in subject.model.named_parameters() if "lora_" not in name}
    assert list(base) == [name for name, _ in subject.plain.named_parameters()]
    assert [name for name, _ in subject.model.named_modules()] == ["", "layer"]
    for verb in (unmerge, merge):
        verb(subject.model)
        wanted = subject.layer(subject.x)
        assert torch.equal(subject.layer(**{subject.case.keyword: subject.x}), wanted)


def test_methods_and_own_forwards_of_a_users_class_see_the_adapter_and_get_all_arguments() -> None:
    subject = make_subject("user's linear")
    assert isinstance(subject.layer, UserLinear)
    assert torch.equal(subject.layer.twice(subject.x), 2 * subject.layer(subject.x))
    subject = make_subject("conv that pads")
    for side in (0, 1):
        assert subject.layer(subject.x, side=side).shape[-1] == 4 + side


def test_what_an_embeddings_own_forward_does_with_the_rows_it_does_with_the_adapter_too() -> None:
    model = nn.Sequential(Scaled(11, 6))
    inject(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ids = torch.arange(11)
    factored = model(ids)
    with merged(model):
        torch.testing.assert_close(factored, model(ids))


class Shifted(nn.Linear):
    """Stands for a layer of torch whose forward has several arguments."""

    def forward(self, input: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        return super().forward(input) + shift


@pytest.mark.parametrize("variant", ["lora", "dora", "loha"])
def test_a_layer_of_torch_whose_forward_has_several_arguments_gets_them_all(monkeypatch, variant: str) -> None:
    monkeypatch.setattr(Shifted.forward, "__module__", "torch.nn.modules.linear")
    model = nn.Sequential(Shifted(6, 4))
    inject(model, LoRAConfig(r=2, init_lora_weights=False, variant=variant))
    x, layer = torch.randn(3, 6), model[0]
    assert not layer.lora.custom_forward
    for shifted in (layer(x, 2.0), layer(x, shift=2.0), layer(input=x, shift=2.0)):
        torch.testing.assert_close(shifted, layer(x) + 2)
    layer(x, 2.0).square().sum().backward()
    assert all(tensor.grad.any() for tensor in layer.stored().values())


@pytest.mark.core
@pytest.mark.parametrize("name", [name for name in SOME if CASES[name].merges])
def test_a_merged_layer_runs_just_the_operators_of_the_plain_one(name: str) -> None:
    subject = make_subject(name)
    wanted = operators(subject.plain, subject.x)
    assert wanted
    assert operators(subject.model, subject.x) != wanted
    merge(subject.model)
    assert operators(subject.model, subject.x) == wanted
    assert not subject.layer._forward_hooks
    assert not subject.layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("layer", "options", "named"),
    [
        (nn.Embedding(11, 6, max_norm=1.5), {}, "'0': max_norm"),
        (nn.Linear(8, 12), {"enable_lora": {"0": [True, False, True, True, False]}}, "5 parts"),
    ],
)
def test_a_layer_that_cannot_have_such_factors_is_refused_by_name(
    layer: nn.Module, options: dict[str, Any], named: str
) -> None:
    model, before = nn.Sequential(layer), type(layer)
    with pytest.raises(LoRAError, match=named):
        inject(model, LoRAConfig(r=R, target_modules=["0"], **options))
    assert type(model[0]) is before


# Which way a layer goes -----------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A linear layer of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x.mean(-1, keepdim=True)) * (x @ self.weight.T)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_kind_of_layer_is_one_class(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_layer, "LAYER_CLASSES", list(lora_layer.LAYER_CLASSES))
    monkeypatch.setattr(layer_kinds, "LAYER_CLASSES", lora_layer.LAYER_CLASSES)

    class LoRAGated(LoRALayer):
        """Gated: A and B as for nn.Linear."""

        KIND = low_rank.LINEAR
        MODULES = (Gated,)

    model = nn.Sequential(Gated())
    config = LoRAConfig(r=2, target_modules=["0"], **options)
    x, weight = torch.randn(3, 4), model[0].weight.detach().clone()
    assert inject(model, config) == ["0"]
    assert isinstance(model[0], LoRAGated)
    with torch.no_grad():
        model[0].lora_B.add_(0.5)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    assert not torch.equal(model[0].weight, weight)
    unmerge(model)
    assert torch.equal(model[0].weight, weight)
    unload(model)
    assert type(model[0]) is Gated
