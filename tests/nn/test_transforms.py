"""Adapted layers under torch.func, in traces that run on other sizes, and with tensors that few operators take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from lightning_lora import LoRAConfig, inject
from support.covering import covering

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python"),  # of a trace
    pytest.mark.filterwarnings("ignore:Using len to get tensor shape"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14"),
]

Parameters = dict[str, torch.Tensor]
make_dual: Any = forward_ad.make_dual
unpack_dual: Any = forward_ad.unpack_dual


class Reader(nn.Module):
    """Reads the weight of its layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(x, x, x, need_weights=False)[0]
        return output


class Table(nn.Module):
    """An embedding, with a layer after it because target_modules may not be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.after = nn.Embedding(10, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.after(self.layer(x))
        return output


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.after, self.layer = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(self.after(x))
        return output


@dataclass
class Case:
    make: Callable[[], nn.Module]
    x: Callable[..., torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        inject(model, LoRAConfig(**{"r": 2, "target_modules": ".*layer|0", **self.options, **options}))
        with torch.no_grad():
            for tensor in trained(model).values():
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
        return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rows(batch: int = 4, length: int = 3) -> torch.Tensor:
    return torch.randn(batch, length, 8)


def tokens(batch: int = 4, length: int = 3) -> torch.Tensor:
    return torch.randint(0, 10, (batch, length))


def images(batch: int = 4, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, 4, length, 5)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3))


SINGLE = {"target_modules": [], "target_parameters": ["layer.weight"]}
CASES = {
    "linear": Case(linear, rows),
    "linear, DoRA": Case(linear, rows, {"use_dora": True}),
    "linear, PiSSA": Case(linear, rows, {"init_lora_weights": "pissa"}),
    "linear, LoHa": Case(linear, rows, {"variant": "loha"}),
    "linear, fused": Case(linear, rows, {"enable_lora": {"0": [True, False]}}),
    "linear, single parameter": Case(Head, rows, SINGLE),
    "linear, read": Case(Reader, rows),
    "head with trained rows": Case(
        Head, rows, {"target_modules": ["after"], "trainable_token_indices": {"layer": [3]}}
    ),
    "embedding, DoRA": Case(Table, tokens, {"use_dora": True}),
    "rows": Case(Table, tokens, {"target_modules": ["after"], "trainable_token_indices": {"layer": [3, 7]}}),
    "convolution, DoRA": Case(conv, images, {"use_dora": True}),
    "attention": Case(Attention, rows),
}


# torch.func -----------------------------------------------------------------------------------------------------------


def several(model: nn.Module, count: int = 3) -> Parameters:
    """Several adapters of a model, each tensor stacked."""
    return {name: torch.stack([each + 0.1 * i for i in range(count)]).detach() for name, each in trained(model).items()}


def of_each(stacked: Parameters, function: Callable[[Parameters], Any]) -> list[Any]:
    count = len(next(iter(stacked.values())))
    return [function({name: each[i] for name, each in stacked.items()}) for i in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_adapters_mapped_over_one_base_give_what_each_gives_alone(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.x()

    def output(adapter: Parameters) -> torch.Tensor:
        result: torch.Tensor = functional_call(model, adapter, (x,))
        return result

    def gradients(adapter: Parameters) -> Parameters:
        leaves = {name: each.clone().requires_grad_() for name, each in adapter.items()}
        return dict(zip(leaves, torch.autograd.grad(output(leaves).square().sum(), list(leaves.values())), strict=True))

    adapters = several(model)
    torch.testing.assert_close(vmap(output)(adapters), torch.stack(of_each(adapters, output)))
    found = vmap(grad(lambda adapter: output(adapter).square().sum()))(adapters)
    for name, values in found.items():
        expected = torch.stack([each[name] for each in of_each(adapters, gradients)])
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention"])  # torch's has no such derivative
def test_derivatives_in_the_direction_of_an_adapter_are_differences_of_outputs(name: str) -> None:
    case = CASES[name]
    model, x = case.model().double(), case.x()
    x = x.double() if x.is_floating_point() else x
    adapter = {name: each.detach() for name, each in trained(model).items()}
    direction = {name: torch.randn_like(each) for name, each in adapter.items()}

    def output(adapter: Parameters) -> torch.Tensor:
        result: torch.Tensor = functional_call(model, adapter, (x,))
        return result

    def dual(adapter: Parameters) -> torch.Tensor:
        with forward_ad.dual_level():
            duals = {name: make_dual(each, direction[name]) for name, each in adapter.items()}
            tangent: torch.Tensor | None = unpack_dual(output(duals)).tangent
        assert tangent is not None
        return tangent

    if "DoRA" not in name:  # whose norm is a constant for derivatives
        step = 1e-5
        moved = [{name: adapter[name] + sign * direction[name] for name in adapter} for sign in (step, -step)]
        expected = (output(moved[0]) - output(moved[1])) / (2 * step)
        torch.testing.assert_close(dual(adapter), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jvp(output, (adapter,), (direction,))[1], dual(adapter))


# traces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention"])  # its heads are split by sizes
def test_a_trace_runs_on_other_sizes(name: str) -> None:
    """Also where the new input has as many elements, so that outputs could be given another shape."""
    case = CASES[name]
    model = case.model()
    trace: Any = torch.jit.trace(model, (case.x(4, 6),), check_trace=False)  # type: ignore[no-untyped-call]
    for sizes in ((7, 6), (4, 5), (6, 4)):
        x = case.x(*sizes)
        torch.testing.assert_close(trace(x), model(x))
    if name == "linear":
        model = case.model(lora_dropout=0.5)
        trace = torch.jit.trace(model, (rows(),), check_trace=False)  # type: ignore[no-untyped-call]
        assert not torch.equal(trace(x), trace(x))  # dropout is drawn anew, for any size


# other inputs ---------------------------------------------------------------------------------------------------------


def flat(nested: torch.Tensor) -> torch.Tensor:
    return torch.cat([each.flatten() for each in nested.unbind()])


OF_ROWS = [name for name, case in CASES.items() if case.x is rows and name != "attention"]


@pytest.mark.parametrize(("name", "layout"), covering(OF_ROWS, [torch.jagged, torch.strided], meet=1))
def test_a_nested_tensor_gives_outputs_and_gradients_of_its_parts(name: str, layout: torch.layout) -> None:
    model, parts = CASES[name].model(), [torch.randn(length, 8) for length in (3, 2)]
    output = model(torch.nested.nested_tensor(parts, layout=layout))
    expected = torch.cat([model(part).flatten() for part in parts])
    torch.testing.assert_close(flat(output), expected)
    adapter = list(trained(model).values())
    found = torch.autograd.grad(flat(output).square().sum(), adapter)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), adapter), rtol=1e-4, atol=1e-5)
    if name in ("linear", "linear, DoRA"):
        model, x = CASES[name].model(lora_dropout=0.5), torch.nested.nested_tensor(parts, layout=layout)
        assert not torch.equal(flat(model(x)), flat(model(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_sparse_input_gives_the_outputs_of_the_dense_one() -> None:
    model, x = CASES["linear"].model(), torch.randn(4, 8).relu()
    for sparse in (x.to_sparse(), x.to_sparse_csr()):
        torch.testing.assert_close(model(sparse), model(x))
