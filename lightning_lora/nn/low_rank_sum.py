"""x W^T + bias + s * x A^T B^T as one operation for autograd: what a GPU is asked to do for a factored linear layer.

    forward    y = x W^T + bias;  h = x A^T;  y += s * h B^T               two kernels more than the base
    backward   u = s * g B;  dB = s * g^T h;  dA = u^T x;  dx = u A;  dx += g W    four more; u is the gradient of h

Autograd would launch more kernels for the same products, and write a tensor of the output's size for most of them.
On the CPU other orders of the products are faster, and compilers and other classes of tensors need plain operators:
`runs_as_one` says where this operation is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from .transforms import is_tracing

Tensor = torch.Tensor
Part = tuple[int, int]  # (first output, number of outputs) of an adapted part of a fused projection


def runs_as_one(x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer with this input and this weight runs as one operation."""
    if x.device.type == "cpu" or torch.compiler.is_compiling() or is_tracing():
        return False
    # A device that is written in Python has its own class of tensors. The bytes of a quantised weight are no values.
    return _class_of(x) is _class_of(weight) and not is_sharded(x) and weight.is_floating_point()


def low_rank_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
    parts: Sequence[Part] | None = None,
) -> Tensor:
    """Return x W^T + bias + s * x A^T B^T.

    Args:
        x: (..., in).
        weight: W (out, in); may be a transposed view.
        bias: (out,) or None.
        a: A (r, in); of n parts (n * r, in), one part below the other. In any dtype.
        b: B (out, r); of n parts their outputs only, one part below the other. In any dtype.
        scaling: s.
        dropped: x after dropout, if A gets that instead of x.
        parts: the outputs that A and B adapt, by default all. Each part has the same number of outputs.
    """
    if _autocasts(x.device.type):
        x, weight = x.to(compute_dtype(x)), weight.to(compute_dtype(weight))
        bias = None if bias is None else bias.to(compute_dtype(bias))
        dropped = None if dropped is None else dropped.to(compute_dtype(dropped))
    shape = (*x.shape[:-1], weight.shape[0])
    rows, dropped_rows = _as_rows(x), None if dropped is None else _as_rows(dropped)
    parts = ((0, weight.shape[0]),) if parts is None else tuple(parts)
    output, _ = LowRankSum.apply(  # type: ignore[no-untyped-call]
        rows, dropped_rows, weight, bias, a.to(x.dtype), b.to(x.dtype), scaling, parts, shape
    )
    return cast(Tensor, output)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x has in a product: autocast's where autocast is on, otherwise its own."""
    casts = x.is_floating_point() and x.dtype != torch.float64 and _autocasts(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class LowRankSum(torch.autograd.Function):
    """The operation on x (rows, in), for an output of any shape. All tensors have one dtype.

    Inputs are x, dropped, weight, bias, a, b, scaling, parts and the output's shape; outputs are the sum and h. h is
    an output so that a gradient of a gradient goes through it.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # torch inspects and binds named ones anew at each call
        x, dropped, weight, bias, a, b, scaling, parts, shape = inputs
        output = x.new_empty(shape)  # no view of the products, so that hooks on it survive a change in place
        rows = output.view(x.shape[0], weight.shape[0])
        if bias is None:
            torch.mm(x, weight.t(), out=rows)
        else:
            torch.addmm(bias, x, weight.t(), out=rows)
        h = torch.mm(x if dropped is None else dropped, a.t())
        for outputs, part_h, part_b in zip(_columns(rows, parts), _chunks(h, parts, 1), _chunks(b, parts), strict=True):
            outputs.addmm_(part_h, part_b.t(), alpha=scaling)
        return output, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dropped, weight, _, a, b, ctx.scaling, ctx.parts, ctx.shape = inputs
        ctx.drops = dropped is not None
        x_needs, dropped_needs, weight_needs, _, a_needs, b_needs, *_ = ctx.needs_input_grad
        seen, seen_needs = (dropped, dropped_needs) if ctx.drops else (x, x_needs)
        ctx.save_for_backward(
            x if weight_needs else None,
            seen if a_needs else None,
            weight if x_needs else None,
            a if seen_needs else None,
            b if seen_needs or a_needs or b_needs else None,
            output[1] if b_needs else None,
        )
        ctx.save_for_forward(x, seen, weight, a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seen, weight, a, b, h = ctx.saved_tensors
        x_needs, dropped_needs, weight_needs, bias_needs, a_needs, b_needs, *_ = ctx.needs_input_grad
        seen_needs = dropped_needs if ctx.drops else x_needs
        u, db = g_h, None
        if g is not None:
            g = g.reshape(-1, g.shape[-1])
            outputs = _columns(g, ctx.parts)
            if seen_needs or a_needs:
                u = _products(outputs, _chunks(b, ctx.parts), ctx.scaling, b, 1)
                u = u if g_h is None else u + g_h
            if b_needs:
                db = _products([each.t() for each in outputs], _chunks(h, ctx.parts, 1), ctx.scaling, b, 0)
        da = torch.mm(u.t(), seen) if a_needs and u is not None else None
        d_seen = torch.mm(u, a) if seen_needs and u is not None else None
        if ctx.drops:
            dx, d_dropped = torch.mm(g, weight) if x_needs and g is not None else None, d_seen
        else:
            dx, d_dropped = d_seen if d_seen is None or g is None else accumulate_product(d_seen, g, weight), None
        d_weight = torch.mm(g.t(), x) if weight_needs and g is not None else None
        d_bias = g.sum(0) if bias_needs and g is not None else None
        return dx, d_dropped, d_weight, d_bias, da, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        """Return the output's and h's change, from the inputs' changes."""
        saved = x, seen, weight, a, b = ctx.saved_tensors
        dx, d_dropped, d_weight, d_bias, da, db, *_ = tangents
        changes = zip((dx, d_dropped if ctx.drops else dx, d_weight, da, db), saved, strict=True)
        dx, d_seen, d_weight, da, db = (
            torch.zeros_like(value) if change is None else change for change, value in changes
        )
        h, d_h = F.linear(seen, a), F.linear(d_seen, a) + F.linear(seen, da)
        d_base = F.linear(dx, weight, d_bias) + F.linear(x, d_weight)
        d_output = plus_parts(plus_parts(d_base, d_h, b, ctx.scaling, ctx.parts), h, db, ctx.scaling, ctx.parts)
        return d_output.reshape(ctx.shape), d_h

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Map plain operators: no product of many adapters can be added in place to the output of one base."""
        scaling, parts, shape = inputs[6:]

        def one(x: Tensor, dropped: Any, weight: Tensor, bias: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            h = F.linear(x if dropped is None else dropped, a)
            return plus_parts(F.linear(x, weight, bias), h, b, scaling, parts).reshape(shape), h

        return torch.vmap(one, in_dims[:6])(*inputs[:6]), (0, 0)


def scaled_product(ignored: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return s * left @ right of matrices, or of stacks of matrices, by one kernel.

    Args:
        ignored: any tensor of finite numbers that broadcasts with the product. No empty tensor: kernels ignore what
            beta = 0 multiplies, but vmap multiplies it.
        left: (m, k) or (n, m, k).
        right: (k, c) or (n, k, c).
        scaling: s.
    """
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    return multiply(ignored.detach(), left, right, beta=0, alpha=scaling)


def accumulate_product(to: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return to + left @ right: in place, unless autograd records the backward."""
    return torch.addmm(to, left, right) if torch.is_grad_enabled() else to.addmm_(left, right)


def plus_parts(base: Tensor, h: Tensor, b: Tensor, scaling: float, parts: Sequence[Part]) -> Tensor:
    """Return base + s * h B^T, part by part, by operators that torch maps and differentiates itself."""
    pieces = list(torch.split(base, parts[0][1], 1))
    for (start, size), part_h, part_b in zip(parts, _chunks(h, parts, 1), _chunks(b, parts), strict=True):
        pieces[start // size] = torch.add(pieces[start // size], F.linear(part_h, part_b), alpha=scaling)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _columns(rows: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the outputs of each adapted part."""
    whole = len(parts) == 1 and parts[0][1] == rows.shape[1]
    return [rows] if whole else [rows.narrow(1, start, size) for start, size in parts]


def _chunks(joined: Tensor, parts: Sequence[Part], dim: int = 0) -> Sequence[Tensor]:
    """Return what belongs to each adapted part."""
    return [joined] if len(parts) == 1 else joined.chunk(len(parts), dim)


def _products(lefts: Sequence[Tensor], rights: Sequence[Tensor], scaling: float, b: Tensor, dim: int) -> Tensor:
    """Return s * left @ right of each pair, with the columns of B, joined along a dimension."""
    products = [scaled_product(b[:1], left, right, scaling) for left, right in zip(lefts, rights, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, dim)


def _as_rows(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _class_of(tensor: Tensor) -> type:
    return torch.Tensor if type(tensor) is nn.Parameter else type(tensor)
