"""x W^T + bias + s * x (B A - B0 A0)^T as one operation for autograd, with gradients of A and B alone.

The change is x [A; A - A0]^T [B - B0, B0]^T: no large terms cancel, and it is zero while A = A0 and B = B0. Autograd on
these stacked factors would compute gradients of twice the rank, and launch more kernels. Here the gradients have the
rank of A. A device keeps the stacked factors for the backward. The CPU makes them again, because a narrow layer's take
as much memory as its input.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from .low_rank import HALF
from .low_rank_sum import accumulate_product, compute_dtype, scaled_product
from .transforms import is_tracing, lies_in_rows

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


def can_change(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Return whether a layer with this input, weight and A should run as this operation.

    Compilers see plain operators. Where gradients are not recorded, plain operators are as fast on the CPU.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return False
    kind = type(x)
    if not (kind is Tensor and torch.is_grad_enabled()) if x.is_cpu else is_sharded(x):
        return False
    kinds = kind, nn.Parameter
    return type(weight) in kinds and type(a) in kinds and lies_in_rows(x)


def low_rank_change(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    now: Pair,
    start: Pair,
    scaling: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias + s * x (B A - B0 A0)^T, differentiable in all but A0 and B0.

    Args:
        x: (..., in), contiguous.
        weight: W (out, in); may be a transposed view.
        bias: (out,) or None.
        now: A (r, in) and B (out, r).
        start: A0 and B0, in the shapes of A and B.
        scaling: s.
        dropped: x after dropout, which the adapter gets instead of x; it may be x itself.
    """
    if dropped is x:
        dropped = None
    base: tuple[Tensor | None, ...] = (x, dropped, weight, bias)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        base = tuple(each if each is None else each.to(compute_dtype(each)) for each in base)
    start_a, start_b = start
    if start_a.requires_grad or start_b.requires_grad:
        start_a, start_b = start_a.detach(), start_b.detach()
    inputs = (*base, *now, start_a, start_b, scaling)
    return cast(Tensor, LowRankChange.apply(*inputs)[0])  # type: ignore[no-untyped-call]


class LowRankChange(torch.autograd.Function):
    """The operation. x, `dropped`, W and the bias have one dtype; A, B, A0 and B0 may have others.

    Beside the output it returns what backward needs, without gradients: h and, not on the CPU, the stacked factors.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        x, dropped, weight, bias, *factors, scaling = inputs
        stacked = _stack(x, *factors)
        h = torch.mm(stacked[0], _rows(x if dropped is None else dropped).t())
        output, rows = _base(x, weight, bias)
        rows.addmm_(h.t(), stacked[1].t(), alpha=scaling)
        return output, h, *_kept(x, stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, dropped, weight, _, *factors, ctx.scaling = inputs
        x_needs, _, weight_needs, *_ = ctx.needs_input_grad
        ctx.has_dropped, seen = dropped is not None, x if dropped is None else dropped
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if weight_needs else None, seen, weight if x_needs else None, *factors, *output[1:])
        ctx.save_for_forward(x, seen, weight, *factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        kind = g.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return _gradients(ctx, g)
        with torch.autocast(kind, enabled=False):  # it would cast some of the products
            return _gradients(ctx, g)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        x, seen, weight, a, b, *start = ctx.saved_tensors
        dx, d_dropped, d_weight, d_bias, da, db, *_ = tangents
        dx, d_weight, da, db = (
            torch.zeros_like(value) if change is None else change
            for value, change in ((x, dx), (weight, d_weight), (a, da), (b, db))
        )
        d_seen = d_dropped if ctx.has_dropped else dx
        stacked_a, stacked_b = stacked = _stack_recorded(x, a, b, *start)
        h, da, db = F.linear(seen, stacked_a), da.to(x.dtype), db.to(x.dtype)
        d_h = F.linear(seen, torch.cat([da, da]))
        d_h = d_h if d_seen is None else d_h + F.linear(d_seen, stacked_a)
        d_change = F.linear(d_h, stacked_b) + F.linear(h[..., : len(a)], db)
        d_output = F.linear(dx, weight, d_bias) + F.linear(x, d_weight) + ctx.scaling * d_change
        return d_output, None, *(None for _ in _kept(x, stacked))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Map plain operators: a product cannot be added in place to a base's output that is the same for all."""
        *tensors, scaling = inputs

        def work(x: Tensor, dropped: Any, weight: Tensor, bias: Any, *factors: Tensor) -> tuple[Tensor, ...]:
            stacked = _stack_recorded(x, *factors)
            h = torch.mm(stacked[0], _rows(x if dropped is None else dropped).t())
            output = F.linear(x, weight, bias)
            change = scaling * torch.mm(h.t(), stacked[1].t())
            return output + change.view(output.shape), h, *_kept(x, stacked)

        outputs = torch.vmap(work, in_dims[:-1])(*tensors)
        return outputs, (0,) * len(outputs)


# torch asks for the signature at each call, and binds the arguments to it: with nine names this takes as long as two
# products of a narrow layer, and half of that to find the signature.
LowRankChange.forward.__signature__ = inspect.signature(LowRankChange.forward)  # type: ignore[attr-defined]


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients; autograd casts them to the dtypes of the inputs."""
    x, seen, weight, a, b, start_a, start_b, h, *stacked = ctx.saved_tensors
    x_needs, dropped_needs, _, bias_needs, a_needs, b_needs, *_ = ctx.needs_input_grad
    shape, rank, seen, g = seen.shape, len(a), _rows(seen), _rows(g)
    if torch.is_grad_enabled():  # for second derivatives all must follow from the inputs
        stacked = _stack_recorded(g, a, b, start_a, start_b)
        h = torch.mm(stacked[0], seen.t())
    stacked_a, stacked_b = stacked or _stack(g, a, b, start_a, start_b)
    u = _scaled_product(stacked_b.t(), g.t(), ctx.scaling, stacked_b[:1].t())
    dx = d_dropped = da = db = None
    if x_needs:
        dx = torch.mm(g, weight)
        dx = _shaped(dx if ctx.has_dropped else accumulate_product(dx, u.t(), stacked_a), shape)
    if dropped_needs:
        d_dropped = _shaped(torch.mm(u.t(), stacked_a), shape)
    if a_needs:  # A is in A and in A - A0
        da = torch.mm(u[:rank] + u[rank:], seen)
    if b_needs:  # B is in B - B0 alone, which meets A x^T
        db = _gradient_of_b(g, h[:rank], ctx.scaling, stacked_b[:1, :rank])
    d_weight = None if x is None else torch.mm(g.t(), _rows(x))
    return dx, d_dropped, d_weight, g.sum(0) if bias_needs else None, da, db, None, None, None


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
    """Return x W^T + bias, and a view of it as rows. It is no view itself: hooks on it survive changes in place."""
    if x.dim() == 2:
        output = F.linear(x, weight, bias)
        return output, output
    output = x.new_empty(*x.shape[:-1], len(weight))
    rows = output.view(-1, len(weight))
    if bias is None:
        torch.mm(_rows(x), weight.t(), out=rows)
    else:
        torch.addmm(bias, _rows(x), weight.t(), out=rows)
    return output, rows


def _gradient_of_b(g: Tensor, h: Tensor, scaling: float, row: Tensor) -> Tensor:
    """Return s * g^T h^T. On the CPU the product with the thin factor on the left is several times faster."""
    if g.device.type == "cpu":
        return _scaled_product(h, g, scaling, row.t()).t()
    return _scaled_product(g.t(), h.t(), scaling, row)


def _scaled_product(left: Tensor, right: Tensor, scaling: float, ignored: Tensor) -> Tensor:
    """Return s * left @ right, by the way that is faster on the device; `ignored` as in scaled_product."""
    if left.device.type != "cpu":
        return scaled_product(ignored, left, right, scaling)
    product = torch.mm(left, right)
    return product if scaling == 1 else product * scaling


def _stack(x: Tensor, a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> Pair:
    """Return [A; A - A0] and [B - B0, B0] in the dtype of x, where autograd does not record."""
    if x.device.type == "cpu":
        return _stack_recorded(x, a, b, start_a, start_b)
    if a.dtype in HALF and a.dtype != x.dtype:  # 16 bits would round the differences
        a, b = a.float(), b.float()
    rank = len(a)
    stacked_a, stacked_b = x.new_empty(2 * rank, a.shape[1]), x.new_empty(len(b), 2 * rank)
    stacked_a[:rank].copy_(a)
    torch.sub(a, start_a, out=stacked_a[rank:])
    torch.sub(b, start_b, out=stacked_b[:, :rank])
    stacked_b[:, rank:].copy_(start_b)
    return stacked_a, stacked_b


def _stack_recorded(x: Tensor, a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> Pair:
    """Return the result of _stack by operators that torch maps and differentiates."""
    if a.dtype in HALF:
        a, b = a.float(), b.float()
    stacked_a, stacked_b = torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], 1)
    return (stacked_a, stacked_b) if stacked_a.dtype == x.dtype else (stacked_a.to(x.dtype), stacked_b.to(x.dtype))


def _kept(x: Tensor, stacked: Pair) -> tuple[Tensor, ...]:
    return () if x.device.type == "cpu" else stacked


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows if len(shape) == 2 else rows.view(shape)
