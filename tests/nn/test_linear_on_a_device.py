"""Linear layers on a device that is not the CPU, pretended here: right as on the CPU, with few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, inject
from support.covering import covering
from support.devices.places import count
from support.models.layers import CASES, make_subject
from support.runs.recorders import Recorder, start_anew

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


def step(model: nn.Module, x: torch.Tensor) -> list[Any]:
    """The output and all gradients of one step, as a list."""
    output = model(x)
    output.backward(upstream(output).to(x.device))
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def frozen_input(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach())


def functional(model: nn.Module, x: torch.Tensor) -> list[Any]:
    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    parameters = dict(model.named_parameters())
    of_each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach()) if x.dim() > 1 else {}
    return [*torch.func.grad(loss)(parameters, x.detach()).values(), *of_each.values()]


def not_contiguous(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(Around(model, lambda given: model(given.transpose(0, 1))), x)


def expanded(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(Around(model, lambda given: model(given.expand(3, *given.shape))), x)


def no_rows(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach()[:0].requires_grad_())


class Around(nn.Module):
    """A model that is called in another way."""

    def __init__(self, model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    ("name", "situation"),
    [
        *covering(["linear, three axes"], [step, frozen_input, not_contiguous, expanded, no_rows, functional]),
        *covering(["linear, one vector", "transformers Conv1D", "fused, outer parts"], [step]),
        *covering(["transformers Conv1D", "fused, inner parts"], [frozen_input, functional], meet=1),
    ],
)
def test_layer_on_a_device_does_what_it_does_on_the_cpu(device: str, name: str, situation: Any) -> None:
    found = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        subject = make_subject(name, torch.float64)
        if where != "cpu":
            assert_uses_the_operation(subject.model.to(where)(subject.x.to(where)), name)
        results = situation(subject.model.to(where), subject.x.to(where).requires_grad_())
        found.append([None if each is None else each.detach().cpu() for each in results])
    for here, there in zip(*found, strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            torch.testing.assert_close(there, here)


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
