"""A factored linear layer as one operation for autograd: against plain operators, on the CPU and in layers on a device.

The operation itself runs on any tensors. Layers use it on a device that is not the CPU, here on the pretended one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from lightning_lora.nn.low_rank_sum import compute_dtype, fits, low_rank_sum
from support.covering import covering
from support.models.layers import rounding

IN, OUT, R, S = 5, 6, 2, 1.5
DOUBLE = torch.float64
NAMES = ("x", "dropped", "weight", "bias", "a", "b")


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Tensors for the operation: of which `low_rank_sum` makes the sum, and `by_operators` too."""

    def __init__(
        self,
        rows: int = 7,
        *,
        drops: bool = False,
        bias: bool = True,
        transposed: bool = False,
        dtype: torch.dtype = DOUBLE,
        trained: tuple[str, ...] = NAMES,
    ) -> None:
        torch.manual_seed(0)
        sizes = {
            "x": (rows, IN),
            "dropped": (rows, IN) if drops else None,
            "weight": (IN, OUT) if transposed else (OUT, IN),
            "bias": (OUT,) if bias else None,
            "a": (R, IN),
            "b": (OUT, R),
        }
        self.tensors = {
            name: None if size is None else torch.randn(size).to(dtype).requires_grad_(name in trained)
            for name, size in sizes.items()
        }
        self.transposed = transposed

    def given(self) -> list[Any]:
        """The tensors that there are, in the order in which `as_one` and `by_operators` take them."""
        return [tensor for tensor in self.tensors.values() if tensor is not None]

    def named(self, tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        rest = iter(tensors)
        x, dropped, weight, *others = (None if each is None else next(rest) for each in self.tensors.values())
        return [x, dropped, weight.t() if self.transposed else weight, *others]

    def as_one(self, *tensors: torch.Tensor) -> torch.Tensor:
        x, dropped, weight, bias, a, b = self.named(tensors)
        x = x.to(compute_dtype(x))  # as a layer does
        return low_rank_sum(x, x if dropped is None else dropped.to(x.dtype), weight, bias, a, b, S)

    def by_operators(self, *tensors: torch.Tensor) -> torch.Tensor:
        x, dropped, weight, bias, a, b = self.named(tensors)
        seen = x if dropped is None else dropped
        return F.linear(x, weight, bias) + S * (seen @ a.T @ b.T)


CASES: dict[str, dict[str, Any]] = {
    "rows": {},
    "no rows": {"rows": 0},
    "no bias": {"bias": False},
    "transposed weight": {"transposed": True},
    "dropped": {"drops": True},
}
TRAINED = {
    "everything": NAMES,
    "factors": ("a", "b"),
    "factors and input": ("x", "dropped", "a", "b"),
    "A": ("a",),
    "A and input": ("x", "a"),
    "B": ("b",),
    "input": ("x",),
    "dropped": ("dropped",),
    "weight": ("weight",),
    "bias": ("bias",),
}


def gradients(
    function: Callable[..., torch.Tensor], case: Case, size: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The output, and each tensor's gradient; `size` is applied to the output's."""
    tensors = {name: None if t is None else t.detach().clone() for name, t in case.tensors.items()}
    for name, tensor in case.tensors.items():
        if tensor is not None:
            tensors[name].requires_grad_(tensor.requires_grad)
    output = function(*(tensor for tensor in tensors.values() if tensor is not None))
    output.backward(size(upstream(output)))
    return output, {name: None if tensor is None else tensor.grad for name, tensor in tensors.items()}


def upstream(output: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(output.shape).to(output.dtype)


@pytest.mark.parametrize(
    ("name", "trained"),
    [("dropped", trained) for trained in TRAINED] + [(name, "everything") for name in CASES if name != "dropped"],
)
def test_output_and_gradients_are_those_of_plain_operators(name: str, trained: str) -> None:
    case = Case(**CASES[name], trained=TRAINED[trained])
    (output, found), (wanted, expected) = gradients(case.as_one, case), gradients(case.by_operators, case)
    torch.testing.assert_close(output, wanted)
    for each, gradient in expected.items():
        assert (found[each] is None) == (gradient is None)
        torch.testing.assert_close(found[each], gradient)


@pytest.mark.parametrize("name", ["rows", "dropped"])
def test_numerical_gradients_agree_twice_and_in_batches(name: str) -> None:
    case = Case(**CASES[name])
    tensors = tuple(case.given())
    assert gradcheck(case.as_one, tensors, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(lambda *each: case.as_one(*each).square(), tensors, fast_mode=True)  # by h and by the output


# What the operation keeps and gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "kept"),
    [
        (("a", "b"), ["seen", "b", "h"]),
        (("x", "dropped", "a", "b"), ["seen", "weight", "a", "b", "h"]),
        (("a",), ["seen", "b"]),
        (("b",), ["b", "h"]),
        (("x",), ["weight"]),
        (("bias",), []),
        (NAMES, ["x", "seen", "weight", "a", "b", "h"]),
    ],
)
def test_no_more_is_kept_for_the_backward_than_it_needs(trained: tuple[str, ...], kept: list[str]) -> None:
    case = Case(drops=True, trained=trained)
    shapes = {name: tensor.shape for name, tensor in case.tensors.items()} | {"seen": (7, IN), "h": (7, R)}
    found: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor.shape), lambda _: None):
        case.as_one(*case.given())
    assert found == [tuple(shapes[name]) for name in kept]


def test_output_is_no_view_and_may_be_changed_in_place_with_a_hook_on_it() -> None:
    """fully_shard puts hooks on outputs, and an activation may then overwrite them."""
    found = []
    for function in ("as_one", "by_operators"):
        case, seen = Case(), []
        output = getattr(case, function)(*case.given())
        assert not output._is_view()
        output.register_hook(seen.append)
        output.mul_(2)
        output.square().sum().backward()
        found.append([*seen, *(tensor.grad for tensor in case.given())])
    torch.testing.assert_close(*found)


def test_input_changed_in_place_after_the_forward_is_noticed_as_torch_does() -> None:
    case = Case(trained=("a", "b"))
    output = case.as_one(*case.given())
    case.tensors["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Dtypes ---------------------------------------------------------------------------------------------------------------


def wide(case: Case, size: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """The same case in float64, with each value or its size."""
    other = copy.copy(case)
    other.tensors = {
        name: None if t is None else size(t.detach().double()).requires_grad_(t.requires_grad)
        for name, t in case.tensors.items()
    }
    return other


@pytest.mark.parametrize(
    ("name", "dtype", "factors"),
    covering(
        ["rows", "dropped", "no rows"], [torch.float32, torch.bfloat16, torch.float16], [None, torch.float32], meet=1
    ),
)
def test_each_dtype_gives_the_outputs_and_gradients_of_float64(
    name: str, dtype: torch.dtype, factors: torch.dtype | None
) -> None:
    case = Case(**CASES[name], dtype=dtype)
    for each in ("a", "b"):
        case.tensors[each] = case.tensors[each].detach().to(factors or dtype).requires_grad_()
    output, found = gradients(case.as_one, case)
    assert output.dtype == dtype
    assert_rounded(case, output, found, dtype)


def assert_rounded(case: Case, output: torch.Tensor, found: dict[str, Any], dtype: torch.dtype) -> None:
    """The output and the gradients are those of float64 up to some roundings."""
    exact, sizes = wide(case, torch.clone), wide(case, torch.abs)
    wanted, expected = gradients(exact.by_operators, exact)
    bound, bounds = gradients(sizes.by_operators, sizes, torch.abs)
    assert ((output.double() - wanted).abs() <= rounding(dtype, bound)).all()
    for each, gradient in expected.items():
        if gradient is not None:
            assert found[each].dtype == case.tensors[each].dtype
            assert ((found[each].double() - gradient).abs() <= rounding(dtype, bounds[each])).all()


@pytest.mark.parametrize(("name", "dtype"), [("rows", torch.bfloat16), ("dropped", torch.float16)])
def test_autocast_casts_each_tensor_once_and_gradients_arrive_in_the_dtypes_of_the_tensors(
    dtype: torch.dtype, name: str
) -> None:
    case = Case(**CASES[name], dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        assert compute_dtype(case.tensors["x"]) == dtype
        output = case.as_one(*case.given())
        assert output.dtype == dtype
        assert case.by_operators(*case.given()).dtype == dtype
    output.backward(upstream(output))
    assert_rounded(case, output, {name: t.grad for name, t in case.tensors.items() if t is not None}, dtype)


def test_autocast_leaves_float64_and_integers_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float64, torch.int64):
            assert compute_dtype(torch.ones(2, dtype=dtype)) == dtype
        case = Case()
        assert case.as_one(*case.given()).dtype == torch.float64
    assert compute_dtype(torch.ones(2, device="meta")) == torch.float32


# Where plain operators stay -------------------------------------------------------------------------------------------


class Other(torch.Tensor):
    """A user's class of tensors."""


def test_which_inputs_run_as_one_operation() -> None:
    there = torch.ones(2, 2, device="meta")
    assert fits(there, there)
    assert fits(there, nn.Parameter(there))
    assert not fits(there.as_subclass(Other), there)
    assert not fits(there, there.as_subclass(Other))
    assert not torch.compile(lambda x: fits(x, x), backend="eager")(torch.ones(2, 2))
