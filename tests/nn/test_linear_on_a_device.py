"""Linear layers on a device that is not the CPU, pretended here: right as on the CPU, with few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, disable_adapter, inject, merge, unmerge
from support.covering import covering
from support.devices import count
from support.layers import CASES, DTYPES, make_subject, rounding
from support.recorders import Recorder, start_anew

LINEAR = ("linear", "linear, one vector", "linear, three axes", "user's linear", "transformers Conv1D")
FUSED = ("fused, outer parts", "fused, inner parts", "fused, all parts", "fused Conv1D")
P = 0.5


def upstream(output: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(output.shape).to(output.dtype)


def assert_uses_the_operation(output: torch.Tensor, name: str = "") -> None:
    """One vector has no rows: for it the formula runs."""
    node: Any = output.grad_fn
    names = [type(each).__name__ for each in (node, *(function for function, _ in node.next_functions))]
    assert any("LowRankSum" in each for each in names) == (name != "linear, one vector"), names


@pytest.mark.parametrize(("name", "dtype"), covering([*LINEAR, *FUSED], DTYPES, meet=1))
def test_layer_on_a_device_gives_outputs_and_gradients_of_float64(device: str, name: str, dtype: torch.dtype) -> None:
    subject = make_subject(name, dtype)
    factors = [subject.layer.lora_A, subject.layer.lora_B]
    wide_ones = [factor.detach().double().requires_grad_() for factor in factors]
    sizes = [factor.detach().double().abs().requires_grad_() for factor in factors]
    x = subject.x.requires_grad_()
    wanted, bound = subject.reference(*wide_ones), subject.reference(*sizes, magnitudes=True)
    g = upstream(wanted).to(dtype)
    expected = torch.autograd.grad(wanted, [*wide_ones, x], g.double())
    bounds = torch.autograd.grad(bound, sizes, g.double().abs())

    subject.model.to(device)
    there = x.detach().to(device).requires_grad_()
    output = subject.model(there)
    assert_uses_the_operation(output, name)
    output.backward(g.to(device))
    assert output.dtype == dtype
    assert ((output.cpu().double() - wanted).abs() <= rounding(dtype, bound)).all()
    for factor, gradient, size in zip((subject.layer.lora_A, subject.layer.lora_B), expected, bounds, strict=False):
        assert ((factor.grad.cpu().double() - gradient).abs() <= rounding(dtype, size)).all()
    torch.testing.assert_close(there.grad.cpu(), expected[-1], rtol=0, atol=32 * torch.finfo(dtype).eps * 8)


def step(model: nn.Module, x: torch.Tensor) -> list[Any]:
    """The output and all gradients of one step, as a list."""
    output = model(x)
    output.backward(upstream(output).to(x.device))
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def trained_base(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model.requires_grad_(True), x)


def frozen_input(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach())


def two_batches(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return [*step(model, x), *step(model, x)]


def twice_in_one_step(model: nn.Module, x: torch.Tensor) -> list[Any]:
    (model(x) * model(x + 1)).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def changed_in_place(model: nn.Module, x: torch.Tensor) -> list[Any]:
    output, seen = model(x), []
    output.register_hook(seen.append)
    output.mul_(2).add_(1)
    output.square().sum().backward()
    return [output, *seen, x.grad, *(parameter.grad for parameter in model.parameters())]


def hooked(model: nn.Module, x: torch.Tensor) -> list[Any]:
    seen: list[Any] = []
    model.layer.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    model.layer.register_forward_hook(lambda module, given, output: seen.append(output))
    model.layer.register_full_backward_hook(lambda module, into, out: seen.extend((*into, *out)))
    return [*step(model, x), *seen]


def checkpointed(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(Around(model, lambda given: checkpoint(model, given, use_reentrant=False)), x)


def checkpointed_reentrant(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(Around(model, lambda given: checkpoint(model, given, use_reentrant=True)), x)


def gradient_of_gradient(model: nn.Module, x: torch.Tensor) -> list[Any]:
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    first = torch.autograd.grad(model(x).square().sum(), trained, create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()
    return [*first, *(tensor.grad for tensor in trained)]


def views_rows(model: nn.Module) -> bool:
    """Whether the layer itself refuses what cannot be viewed as rows."""
    return isinstance(model.layer, Conv1D)


def functional(model: nn.Module, x: torch.Tensor) -> list[Any]:
    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    parameters = dict(model.named_parameters())
    of_each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach()) if x.dim() > 1 else {}
    return [*torch.func.grad(loss)(parameters, x.detach()).values(), *of_each.values()]


def not_contiguous(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return (
        step(Around(model, lambda given: model(given.transpose(0, 1))), x)
        if x.dim() > 2 and not views_rows(model)
        else []
    )


def expanded(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return [] if views_rows(model) else step(Around(model, lambda given: model(given.expand(3, *given.shape))), x)


def no_rows(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach()[:0].requires_grad_()) if x.dim() > 1 else []


def without_gradients(model: nn.Module, x: torch.Tensor) -> list[Any]:
    with torch.no_grad():
        return [model(x), model(x * 2)]


def disabled_and_merged(model: nn.Module, x: torch.Tensor) -> list[Any]:
    with disable_adapter(model):
        plain = step(model, x)
    merge(model)
    merged_output = model(x)
    unmerge(model)
    return [*plain, merged_output, *step(model, x)]


class Around(nn.Module):
    """A model that is called in another way."""

    def __init__(self, model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


def applies(name: str, situation: Any) -> bool:
    """Whether the layer itself takes such inputs."""
    return "Conv1D" not in name or situation not in (not_contiguous, expanded)


SITUATIONS: list[Callable[[Any, torch.Tensor], list[Any]]] = [
    *(step, trained_base, frozen_input, two_batches, twice_in_one_step, changed_in_place, hooked, checkpointed),
    *(checkpointed_reentrant, gradient_of_gradient, functional, not_contiguous, expanded, no_rows, without_gradients),
    disabled_and_merged,
]


@pytest.mark.parametrize(
    ("name", "situation"),
    [
        *covering(
            ["linear, three axes", "transformers Conv1D", "fused, outer parts"], SITUATIONS, meet=1, fits=applies
        ),
        *covering(["linear, three axes"], [not_contiguous, expanded]),
        ("linear, one vector", step),
    ],
)
def test_layer_on_a_device_does_what_it_does_on_the_cpu(device: str, name: str, situation: Any) -> None:
    found = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        subject = make_subject(name, torch.float64)
        results = situation(subject.model.to(where), subject.x.to(where).requires_grad_())
        found.append([None if each is None else each.detach().cpu() for each in results])
    for here, there in zip(*found, strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            torch.testing.assert_close(there, here)


@pytest.mark.parametrize(
    ("name", "dtype", "drops"),
    covering(
        ["linear", "linear, three axes", "transformers Conv1D", "fused, outer parts"],
        [torch.bfloat16, torch.float16],
        [False, True],
        meet=1,
    ),
)
def test_layer_on_a_device_under_autocast_agrees_with_float64(
    device: str, name: str, dtype: torch.dtype, drops: bool
) -> None:
    subject = make_subject(name, lora_dropout=0.9 if drops else 0.0)
    if drops:
        subject.x = torch.zeros_like(subject.x)  # so that dropout drops nothing, but takes its way
    wide_ones = [f.detach().double().requires_grad_() for f in (subject.layer.lora_A, subject.layer.lora_B)]
    sizes = [factor.detach().abs().requires_grad_() for factor in wide_ones]
    wanted, bound = subject.reference(*wide_ones), subject.reference(*sizes, magnitudes=True)
    g = upstream(wanted).to(dtype)
    wanted.backward(g.double())
    bound.backward(g.double().abs())
    subject.model.to(device).train()
    with torch.autocast(device, dtype):
        output = subject.model(subject.x.to(device))
    assert output.dtype == dtype
    assert_uses_the_operation(output)
    output.backward(g.to(device))
    assert ((output.cpu().double() - wanted).abs() <= rounding(dtype, bound)).all()
    for factor, exact, size in zip((subject.layer.lora_A, subject.layer.lora_B), wide_ones, sizes, strict=True):
        assert factor.grad.dtype == torch.float32
        assert ((factor.grad.cpu().double() - exact.grad).abs() <= rounding(dtype, size.grad)).all()


# What a device is asked to do -----------------------------------------------------------------------------------------


def asked(
    device: str, name: str, dtype: torch.dtype = torch.float32, *, autocast: bool = False, **options: Any
) -> dict[str, int]:
    """The launches of a step beyond those of the frozen layer, by operator."""
    counts = []
    for adapted in (False, True):
        subject = make_subject(name, dtype, **options)
        g = torch.randn_like(subject.plain(subject.x)).to(device, torch.bfloat16 if autocast else dtype)
        model = (subject.model if adapted else subject.plain).to(device).train()
        x = subject.x.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            counts.append(count(lambda model=model, x=x, g=g: model(x).backward(g)))
    return {name: number for name, number in (counts[1] - counts[0]).operators.items() if number}


@pytest.mark.parametrize("name", ["linear, three axes", "transformers Conv1D", *FUSED[:2]])
def test_a_layer_launches_six_products_beside_its_base_and_nothing_else(counted_device: str, name: str) -> None:
    found = asked(counted_device, name)
    if CASES[name].parts:  # B is written as a block-diagonal one
        for small in ("block_diag", "new_zeros", "cat"):
            assert found.pop(small, 0) <= 2
    assert found == {"mm": 2, "addmm": 2, "addmm_": 2}


@pytest.mark.parametrize(("options", "drops"), [({"dtype": torch.bfloat16}, True), ({"autocast": True}, False)])
def test_factors_in_float32_are_cast_once_and_their_gradients_are_cast_back(
    counted_device: str, options: dict[str, Any], drops: bool
) -> None:
    found = asked(counted_device, "linear, three axes", **options, lora_dropout=P if drops else 0.0)
    assert found["_to_copy"] == 4


def test_dropout_adds_its_own_kernels_and_one_sum_of_gradients(counted_device: str) -> None:
    found = asked(counted_device, "linear, three axes", lora_dropout=P)
    x = torch.ones(3, device=counted_device, requires_grad=True)
    own = count(lambda: F.dropout(x, P).sum().backward()).operators
    for name in ("ones", "sum", "fill_", "ones_like"):
        own.pop(name, None)
    for name, number in own.items():
        assert found.pop(name) == number
    assert found == {"mm": 3, "addmm": 2, "addmm_": 1, "add": 1}


# Graphs ---------------------------------------------------------------------------------------------------------------


def as_compiled(model: nn.Module, x: torch.Tensor) -> list[str]:
    torch._dynamo.reset()
    recorder = Recorder()
    torch.compile(model, backend=recorder, fullgraph=True)(x).sum().backward()
    return recorder.code().splitlines()


def as_exported(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [str(node.target) for node in torch.export.export(model, (x,)).graph.nodes]


def as_traced(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [node.kind() for node in torch.jit.trace(model, x, check_trace=False).inlined_graph.nodes()]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14")
@pytest.mark.parametrize(("written", "drops"), covering([as_compiled, as_exported, as_traced], [True, False], meet=1))
def test_a_graph_of_a_layer_on_a_device_is_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, written: Callable[[nn.Module, torch.Tensor], list[str]], drops: bool
) -> None:
    """On a device whose tensors have no values, because compilers know that one."""
    start_anew(monkeypatch)
    model = nn.Sequential(nn.Linear(5, 6))
    inject(model, LoRAConfig(r=2, lora_dropout=P if drops else 0.0))
    x = torch.ones(3, 5)
    wanted = written(model, x)
    assert any("linear" in line for line in wanted)
    model.to("meta")
    assert_uses_the_operation(model(x.to("meta")))
    assert written(model, x.to("meta")) == wanted
