"""A product that is added to a base's outputs in one operation: against plain operators, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lightning_lora.nn.added_product import add_product

OUT, R, S = 5, 2, 1.5
DOUBLE = torch.float64


class Case:
    """Tensors for the operation, of which `as_one` and `by_operators` make the sum."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dim: int = -1,
        last: bool = False,
        ignores: bool = False,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        torch.manual_seed(0)
        self.dim, self.ignored = dim, None
        hidden, places = list(shape), list(shape)
        hidden[dim], places[dim] = R, 1
        self.tensors = [torch.randn(shape), torch.randn(hidden), torch.randn(OUT, R)]
        if last:
            self.tensors[:2] = [each.to(memory_format=torch.channels_last) for each in self.tensors[:2]]
        self.tensors = [each.to(dtype) for each in self.tensors]
        if ignores:
            self.ignored = torch.rand(places) < 0.5

    def leaves(self) -> list[torch.Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in self.tensors]

    def as_one(self, base: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return add_product(base.clone(), hidden, b, S, self.dim, self.ignored)

    def by_operators(self, base: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = S * (hidden.movedim(self.dim, -1) @ b.T).movedim(-1, self.dim)
        return base + (product if self.ignored is None else torch.where(self.ignored, product.detach(), product))


IMAGES = {"shape": (2, OUT, 3, 4), "dim": -3}
CASES: dict[str, dict[str, Any]] = {
    "rows": {"shape": (4, OUT)},
    "three axes": {"shape": (2, 3, OUT)},
    "one vector": {"shape": (OUT,)},
    "no rows": {"shape": (0, OUT)},
    "ignored rows": {"shape": (4, OUT), "ignores": True},
    "sequences": {"shape": (2, OUT, 3), "dim": -2},
    "images": IMAGES,
    "one image": {"shape": (1, OUT, 3, 4), "dim": -3},
    "unbatched image": {"shape": (OUT, 3, 4), "dim": -3},
    "images of one pixel": {"shape": (2, OUT, 1, 1), "dim": -3},
    "volumes": {"shape": (2, OUT, 2, 3, 2), "dim": -4},
    "no images": {"shape": (0, OUT, 3, 4), "dim": -3},
    "ignored images": {**IMAGES, "ignores": True},
    "channels last": {**IMAGES, "last": True},
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@EVERY_CASE
@pytest.mark.parametrize("trained", [(0, 1, 2), (1, 2), (0,), (1,), (2,)])
def test_output_and_gradients_are_those_of_plain_operators(name, trained):
    case = Case(**CASES[name])
    found = []
    for function in (case.as_one, case.by_operators):
        leaves = [leaf.requires_grad_(place in trained) for place, leaf in enumerate(case.leaves())]
        output = function(*leaves)
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        found.append([output, *(leaf.grad for leaf in leaves)])
    for ours, wanted in zip(*found, strict=True):
        assert (ours is None) == (wanted is None)
        torch.testing.assert_close(ours, wanted)


@EVERY_CASE
def test_numerical_gradients_agree_forward_backward_twice_and_in_batches(name):
    case = Case(**{**CASES[name], "ignores": False})  # else they are no derivatives of the output
    options: Any = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(case.as_one, case.leaves(), check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(case.as_one, case.leaves(), **options)


def loss_of(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *tensors: function(*tensors).square().sum()


ALL = (0, 1, 2)
TRANSFORMS: dict[str, Callable[[Any, list[torch.Tensor]], Any]] = {
    "grad": lambda f, given: torch.func.grad(loss_of(f), ALL)(*given),
    "jvp": lambda f, given: torch.func.jvp(f, tuple(given), tuple(each + 1 for each in given)),
    "jvp of B": lambda f, given: torch.func.jvp(lambda b: f(*given[:2], b), (given[2],), (given[2] + 1,)),
    "jacrev": lambda f, given: torch.func.jacrev(f, ALL)(*given),
    "jacfwd": lambda f, given: torch.func.jacfwd(f, ALL)(*given),
    "hessian": lambda f, given: torch.func.hessian(loss_of(f), ALL)(*given),
    "vmap over bases": lambda f, given: torch.vmap(f, (0, None, None))(torch.stack([given[0]] * 3), *given[1:]),
    "vmap over adapters": lambda f, given: torch.vmap(f, (None, 0, 0))(
        given[0], *(torch.stack([each, 2 * each]) for each in given[1:])
    ),
    "gradients of each adapter": lambda f, given: torch.vmap(torch.func.grad(loss_of(f), ALL), (None, None, 0))(
        *given[:2], torch.stack([given[2], 2 * given[2]])
    ),
    "gradient of a vmap": lambda f, given: torch.func.grad(
        lambda *tensors: torch.vmap(f, (None, None, 0))(*tensors).square().sum(), ALL
    )(*given[:2], torch.stack([given[2], 2 * given[2]])),
}


@pytest.mark.parametrize("name", ["rows", "ignored rows", "images", "ignored images", "channels last"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_transform_of_torch_func_gives_what_it_gives_of_plain_operators(transform, name):
    case = Case(**CASES[name])
    found, wanted = (TRANSFORMS[transform](f, case.tensors) for f in (case.as_one, case.by_operators))
    torch.testing.assert_close(found, wanted)


def test_batches_of_gradients_do_not_read_memory_without_values(monkeypatch):
    """A kernel ignores the tensor that is multiplied by beta=0, and torch.vmap does not."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    for name in ("rows", "images", "channels last"):
        case = Case(**CASES[name])
        found, wanted = (torch.func.jacrev(f, ALL)(*case.tensors) for f in (case.as_one, case.by_operators))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["ignored rows", "ignored images"])
def test_a_gradient_at_an_ignored_place_reaches_no_factor_even_if_it_is_not_finite(name):
    case = Case(**CASES[name])
    base, hidden, b = case.leaves()
    output = case.as_one(base, hidden, b)
    torch.manual_seed(1)
    gradient = torch.randn_like(output)
    spoilt = gradient.masked_fill(case.ignored, torch.nan)
    found = torch.autograd.grad(output, [hidden, b], spoilt, retain_graph=True)
    wanted = torch.autograd.grad(output, [hidden, b], gradient)
    assert all(torch.equal(ours, expected) for ours, expected in zip(found, wanted, strict=True))
    assert all(gradient.isfinite().all() for gradient in found)


@EVERY_CASE
def test_output_takes_the_memory_of_the_base_and_is_no_view(name):
    case = Case(**CASES[name])
    base, hidden, b = case.tensors
    address, strides = base.data_ptr(), base.stride()
    output = add_product(base, hidden.requires_grad_(), b, S, case.dim, case.ignored)
    assert (output.data_ptr(), output.stride()) == (address, strides)
    assert not output._is_view()
    output.mul_(2).sum().backward()
    assert hidden.grad is not None


def test_a_base_in_another_order_of_memory_is_copied_first():
    case = Case(**IMAGES)
    base, hidden, b = case.tensors
    strange = base.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(add_product(strange, hidden, b, S, -3), case.by_operators(base, hidden, b))
    assert torch.equal(strange, base)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(quiet):
    case = Case(**CASES["rows"])
    with quiet():
        output = case.as_one(*case.leaves())
    assert output.grad_fn is None
    torch.testing.assert_close(output, case.by_operators(*case.tensors))


def test_nothing_of_the_outputs_size_is_kept():
    case = Case((64, OUT))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        case.as_one(*case.leaves())
    assert kept == [(64, R), (OUT, R)]


@pytest.mark.parametrize("name", ["rows", "images", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_in_another_dtype_get_gradients_in_theirs(dtype, name):
    exact = Case(**CASES[name])
    base, hidden, b = exact.leaves()
    wanted = exact.as_one(base, hidden, b)
    wanted.sum().backward()
    rounded = [exact.tensors[0].to(dtype), *(each.detach().float().requires_grad_() for each in exact.tensors[1:])]
    output = exact.as_one(*rounded)
    assert output.dtype == dtype
    output.sum().backward()
    tolerances = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(output.double(), wanted, **tolerances)
    for found, expected in zip(rounded[1:], (hidden, b), strict=True):
        assert found.grad.dtype == torch.float32
        torch.testing.assert_close(found.grad.double(), expected.grad, **tolerances)
