"""The scale of a layer's outputs as one operation: the values and gradients of plain operators, wherever torch asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_lora.nn import scaled_output as scaled
from lightning_lora.nn.scaled_output import ScaledOutput, scaled_output

# shapes of sums, scale and bias: of a linear layer, of one input, of a convolution, of a layer with one output
SHAPES = [((3, 5, 4), (4,), (4,)), ((4,), (4,), (4,)), ((2, 4, 3, 5), (4, 1, 1), (4, 1, 1)), ((3, 1), (1,), (1,))]
SHAPES += [(sums, scale, None) for sums, scale, _ in SHAPES]


def given(shapes: Any, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(0)
    sums, scale, bias = shapes
    tensors = [torch.randn(sums, dtype=dtype), 1 + 0.3 * torch.randn(scale, dtype=dtype)]
    tensors.append(None if bias is None else torch.randn(bias, dtype=dtype))
    return [each if each is None else each.requires_grad_() for each in tensors]


def as_one(sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return ScaledOutput.apply(sums, scale, bias)[0]


def plain(sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return sums * scale if bias is None else (sums - bias) * scale + bias


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_of_any_order_and_direction_are_those_of_the_values(shapes: Any) -> None:
    tensors = given(shapes)
    torch.testing.assert_close(as_one(*tensors), plain(*tensors))
    torch.autograd.gradcheck(as_one, tensors, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(as_one, tensors)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_gradients_that_are_asked_for_are_computed(needed: tuple[int, ...]) -> None:
    tensors = [each.requires_grad_(i in needed) for i, each in enumerate(given(SHAPES[0]))]
    as_one(*tensors).square().sum().backward()
    found = [each.grad for each in tensors]
    plain(*(copies := [each.detach().requires_grad_(each.requires_grad) for each in tensors])).square().sum().backward()
    assert [each is None for each in found] == [i not in needed for i in range(3)]
    for one, copy in zip(found, copies, strict=True):
        torch.testing.assert_close(one, copy.grad)


@pytest.mark.parametrize("shapes", [SHAPES[0], SHAPES[4]])
@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (0, 0, 0)])
def test_mapped_and_differentiated_by_torch_func_it_is_the_same(shapes: Any, dims: tuple[Any, ...]) -> None:
    tensors = [each if each is None else each.detach() for each in given(shapes)]
    dims = tuple(None if each is None else dim for each, dim in zip(tensors, dims, strict=True))
    stacked = [each if dim is None else torch.stack([each, 2 * each]) for each, dim in zip(tensors, dims, strict=True)]
    found = torch.func.vmap(as_one, dims)(*stacked)
    torch.testing.assert_close(found, torch.func.vmap(plain, dims)(*stacked))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        one, other = (transform(function, argnums=(0, 1))(*tensors) for function in (as_one, plain))
        torch.testing.assert_close(one, other)
    ones, others = (
        torch.func.vmap(torch.func.grad(lambda *t, f=f: f(*t).square().sum(), argnums=1), dims)(*stacked)
        for f in (as_one, plain)
    )
    torch.testing.assert_close(ones, others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_the_scale_of_another_dtype_is_applied_and_summed_as_exactly_as_they_allow(
    dtype: torch.dtype,
) -> None:
    sums = torch.randn(2000, 4).to(dtype).requires_grad_()
    bias, scale = torch.randn(4).to(dtype), torch.tensor([1.0, 1.001, 0.9, 1.3]).requires_grad_()
    upstream = (sums - bias).detach()  # terms of one sign, whose sum is large
    found = as_one(sums, scale, bias)
    found.backward(upstream)
    assert found.dtype == dtype
    assert torch.equal(found[:, 0], sums[:, 0])
    wide = [each.detach().double().requires_grad_() for each in (sums, scale, bias)]
    wanted = plain(*wide)
    wanted.backward(upstream.double())
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=2 * half_ulp, atol=4 * half_ulp)
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    terms = (upstream.double() * (sums.double() - bias.double())).norm(dim=0)
    assert ((scale.grad - wide[1].grad).abs() < 4 * half_ulp * terms).all()  # the roundings of the terms do not add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_that_misses_one_by_an_ulp_changes_no_bit_and_gets_its_gradient(dtype: torch.dtype) -> None:
    sums, scale, bias = given(SHAPES[0], dtype)
    eps = torch.finfo(dtype).eps
    scale = torch.tensor([1 - eps, 1 + 2 * eps, 1 + 200 * eps, 2.0], dtype=dtype, requires_grad=True)
    found = as_one(sums, scale, bias)
    assert torch.equal(found[..., :2], sums[..., :2])
    assert not torch.equal(found[..., 2], sums[..., 2])
    found.sum().backward()
    torch.testing.assert_close(scale.grad, (sums - bias).sum((0, 1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_has_the_same_gradients(reentrant: bool) -> None:
    tensors = given(SHAPES[0])
    as_one(*tensors).square().sum().backward()
    wanted = [each.grad.clone() for each in tensors]
    again = [each.detach().requires_grad_() for each in tensors]
    checkpoint(as_one, *again, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip(again, wanted, strict=True):
        torch.testing.assert_close(one.grad, other)


def test_the_output_may_be_changed_in_place_and_an_empty_batch_is_empty() -> None:
    tensors = given(SHAPES[0])
    as_one(*tensors).mul_(2).sum().backward()
    found = [each.grad for each in tensors]
    (plain(*(again := given(SHAPES[0]))) * 2).sum().backward()
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other.grad)
    empty = torch.empty(0, 4, dtype=torch.float64, requires_grad=True)
    output = as_one(empty, *tensors[1:])
    output.sum().backward()
    assert output.shape == (0, 4)
    assert not tensors[1].grad.isnan().any()


@pytest.mark.parametrize("bias", [True, False])
def test_on_the_cpu_plain_operators_run_and_a_scale_of_one_changes_no_bit(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled, "ScaledOutput", None)
    sums, offset = torch.randn(50, 4) * 1e3, torch.randn(4) if bias else None
    before = sums.clone()
    assert torch.equal(scaled_output(sums, torch.ones(4), offset), before)
    found = scaled_output(before.clone(), torch.tensor([1.0, 2.0, 0.5, -1.0]), offset)
    torch.testing.assert_close(found, plain(before, torch.tensor([1.0, 2.0, 0.5, -1.0]), offset))
