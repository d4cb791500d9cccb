"""Convolutions, embeddings, quantised layers and stacks of experts on a device that is not the CPU, pretended here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_linear_on_a_device import SITUATIONS, as_compiled, as_exported, as_traced, upstream
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.adapted_module import swapped_class
from lightning_lora.nn.linear import LoRAQuantisedLinear
from support.covering import covering
from support.devices import Count, count
from support.layers import CASES, make_subject, rounding
from support.recorders import start_anew

EMBEDDINGS = ["embedding", "embedding, padding", "embedding, sparse"]
BY_FREQUENCY = "embedding, by frequency"
P = 0.5


class Times(nn.Module):
    """An embedding of the same tokens, times an input."""

    def __init__(self, layer: nn.Module, tokens: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("tokens", tokens // 2)  # one of the situations doubles them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(self.tokens) * x
        return result


def subject_of(name: str, last: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A model in float64 and an input of it that may be trained."""
    subject = make_subject(name, torch.float64)
    if CASES[name].tokens:
        return Times(subject.layer, subject.x), torch.randn(6, dtype=torch.float64)
    if last:
        return subject.model.to(memory_format=torch.channels_last), subject.x.to(memory_format=torch.channels_last)
    return subject.model, subject.x


SOME = ["conv1d", "conv1d, unbatched", "conv2d", "conv2d, channels last", "conv2d, circular", "conv3d"]
ELSEWHERE = {  # situations that are none for these layers
    "conv1d, unbatched": ("changed_in_place", "functional"),  # its base's output is a view; it has no samples
    "embedding, sparse": ("functional",),  # a sparse gradient of W
}


OF_THESE = [each for each in SITUATIONS if each.__name__ not in ("not_contiguous", "expanded", "no_rows")]


def is_one(name: str, situation: Any) -> bool:
    return situation.__name__ not in ELSEWHERE.get(name, ())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize(
    ("name", "situation"),
    covering([*SOME, "conv2d, groups", *EMBEDDINGS, BY_FREQUENCY], OF_THESE, meet=1, fits=is_one),
)
def test_layer_on_a_device_does_what_it_does_on_the_cpu(device, name, situation):
    found = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        model, x = subject_of(name.removesuffix(", channels last"), last="last" in name)
        if situation.__name__ == "trained_base" and name == "embedding, sparse":
            model.layer.sparse = False  # an optimizer of sparse gradients is not the subject
        results = situation(model.to(where), x.to(where).requires_grad_())
        found.append([None if each is None else each.detach().cpu() for each in results])
    for here, there in zip(*found, strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            torch.testing.assert_close(there, here)


@pytest.mark.parametrize("name", EMBEDDINGS[1:])
def test_rows_of_a_device_may_be_changed_in_place_and_looked_up_by_a_single_number(device, name):
    subject = make_subject(name, torch.float64)
    single = torch.tensor(5)
    wanted = subject.reference(subject.layer.lora_A.detach(), subject.layer.lora_B.detach())
    subject.x = single
    row = subject.reference(subject.layer.lora_A.detach(), subject.layer.lora_B.detach())
    subject.model.to(device)
    tokens = CASES[name].make_input(torch.float64)
    torch.testing.assert_close(subject.model(single.to(device)).cpu(), row)
    output = subject.model(tokens.to(device))
    assert output.shape == wanted.shape
    output.mul_(2).sum().backward()
    assert subject.layer.lora_A.grad.abs().sum() > 0


def test_a_padded_place_gives_the_factors_no_gradient_that_is_not_finite(device):
    subject = make_subject("embedding, padding", torch.float32)
    padding = subject.layer.padding_idx
    subject.model.to(device)
    output = subject.model(torch.tensor([1, padding, 2], device=device))
    g = torch.ones(output.shape)
    g[1] = torch.nan
    output.backward(g.to(device))
    for factor in (subject.layer.lora_A, subject.layer.lora_B):
        assert factor.grad.cpu().isfinite().all()
    assert not subject.layer.lora_A.grad.cpu()[:, padding].any()


@pytest.mark.parametrize(("name", "dtype"), covering(["conv2d", "embedding, padding"], [torch.bfloat16, torch.float16]))
def test_layer_on_a_device_under_autocast_agrees_with_float64(device, name, dtype):
    subject = make_subject(name)
    wide_ones = [f.detach().double().requires_grad_() for f in (subject.layer.lora_A, subject.layer.lora_B)]
    sizes = [factor.detach().abs().requires_grad_() for factor in wide_ones]
    wanted, bound = subject.reference(*wide_ones), subject.reference(*sizes, magnitudes=True)
    g = upstream(wanted).to(dtype)
    wanted.backward(g.double())
    bound.backward(g.double().abs())
    subject.model.to(device)
    with torch.autocast(device, dtype):
        output = subject.model(subject.x.to(device))
    assert output.dtype == (torch.float32 if CASES[name].tokens else dtype)
    output.backward(g.to(device, output.dtype))
    assert ((output.cpu().double() - wanted).abs() <= rounding(dtype, bound)).all()
    for factor, exact, size in zip((subject.layer.lora_A, subject.layer.lora_B), wide_ones, sizes, strict=True):
        assert factor.grad.dtype == torch.float32
        assert ((factor.grad.cpu().double() - exact.grad).abs() <= rounding(dtype, size.grad)).all()


# Quantised layers -----------------------------------------------------------------------------------------------------


class Packed(nn.Linear):
    """Stands for a layer with a quantised weight, for which this device has no kernels: a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def packed(width: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Packed(width, width)).double()
    inject(model, LoRAConfig(r=2, init_lora_weights=False, **options))
    model[0].__class__ = swapped_class(LoRAQuantisedLinear, Packed)
    model[0].lora.custom_forward = False
    return model


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)])
def test_quantised_layer_on_a_device_adds_the_product_to_the_forward_of_its_own_class(device, shape):
    found = []
    for where in ("cpu", device):
        model = packed()
        torch.manual_seed(2)
        x = torch.randn(shape, dtype=torch.float64).to(where).requires_grad_()
        output = model.to(where)(x)
        output.backward(upstream(output.cpu()).to(where))
        found.append([output.detach().cpu(), x.grad.cpu(), model[0].lora_A.grad.cpu(), model[0].lora_B.grad.cpu()])
    torch.testing.assert_close(*found)


def test_quantised_layer_on_a_device_writes_its_product_into_the_bases_output(counted_device):
    x = torch.randn(4, 6, dtype=torch.float64).to(counted_device)
    frozen = nn.Sequential(Packed(6, 6)).double().requires_grad_(False).to(counted_device)
    added = step_of(packed().to(counted_device), x) - step_of(frozen, x)
    small = {"mul": 2, "clone": 1, "copy_": 1}  # by s; B and its gradient are transposed
    assert added.operators == {"mm": 5, "addmm_": 1, "add": 1, **small}  # the sum is of the gradients of x


# What a device is asked to do -----------------------------------------------------------------------------------------


def step_of(model: nn.Module, x: torch.Tensor) -> Count:
    x = x.detach().requires_grad_()
    return count(lambda: model(x).sum().backward())


def asked(device: str, name: str, dtype: torch.dtype = torch.float32, last: bool = False) -> dict[str, int]:
    """The launches of a step beyond those of the frozen layer, by operator."""
    counts = []
    for adapted in (False, True):
        subject = make_subject(name, dtype)
        g = torch.randn_like(subject.plain(subject.x)).to(device)
        model, x = (subject.model if adapted else subject.plain).to(device), subject.x.to(device)
        if last:
            model, x, g = (each.to(memory_format=torch.channels_last) for each in (model, x, g))
        x = x.requires_grad_(x.is_floating_point())

        def step(model: nn.Module = model, x: torch.Tensor = x, g: torch.Tensor = g) -> None:
            output = model(x)
            if output.requires_grad:
                output.backward(g)

        counts.append(count(step))
    return dict((counts[1] - counts[0]).operators)


@pytest.mark.parametrize("name", ["conv2d", "embedding"])
def test_factors_in_float32_are_cast_once_and_their_gradients_are_cast_back(counted_device, name):
    plain, found = asked(counted_device, name), asked(counted_device, name, torch.bfloat16)
    assert found.pop("_to_copy") == 4
    assert found == plain


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=experts, num_experts_per_tok=1)
        config._experts_implementation = "eager"
        self.experts = modeling_mixtral.MixtralExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter)
        self.register_buffer("chosen", torch.arange(experts)[:, None])
        self.register_buffer("weights", torch.ones(experts, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(x, self.chosen, self.weights)
        return result


@pytest.mark.transformers_5
def test_gradients_of_single_experts_are_joined_once(counted_device):
    """Indexing a stack gives each expert a gradient of the whole stack's size."""
    model = Experts(5)
    inject(model, LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    model.to(counted_device)
    found = step_of(model, torch.randn(5, 4).to(counted_device)).operators
    assert found["stack"] == 4  # of both factors of both stacks
    assert found["select_backward"] == 0


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14")
@pytest.mark.parametrize(
    ("layer", "x", "written"),
    [  # torch cannot trace a convolution without values
        (lambda: nn.Conv2d(3, 4, 3), torch.ones(2, 3, 5, 5), as_exported),
        (lambda: nn.Embedding(7, 4), torch.arange(6).view(2, 3), as_compiled),
        (lambda: nn.Embedding(7, 4), torch.arange(6).view(2, 3), as_traced),
    ],
    ids=["convolution", "embedding", "embedding, traced"],
)
def test_a_graph_of_a_layer_on_a_device_is_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    layer: Callable[[], nn.Module],
    x: torch.Tensor,
    written: Callable[[nn.Module, torch.Tensor], list[str]],
):
    """On a device whose tensors have no values, because compilers know that one."""
    start_anew(monkeypatch)
    model = nn.Sequential(layer())
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    wanted = written(model, x)
    assert any("conv" in line or "embedding" in line for line in wanted)
    model.to("meta")
    assert written(model, x.to("meta")) == wanted
