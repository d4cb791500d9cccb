"""x W^T + bias + s * x A^T B^T as one operation for autograd: what a GPU is asked to do for a factored linear layer.

    forward    y = x W^T + bias;  h = x A^T;  y += s * h B^T               two kernels more than the base
    backward   u = s * g B;  dB = s * g^T h;  dA = u^T x;  dx = u A;  dx += g W    four more; u is the gradient of h

Autograd would launch more kernels for the same products, and write a tensor of the output's size for most of them.
On the CPU other orders of the products are faster, and compilers see plain operators: `fits` says where this operation
is used.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

Tensor = torch.Tensor


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the operation takes a layer's input and weight. Neither is on the CPU or sharded."""
    # A device that is written in Python has its own class of tensors.
    return not torch.compiler.is_compiling() and _class_of(x) is _class_of(weight)


def low_rank_sum(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Return x W^T + bias + s * dropped A^T B^T, (n, out).

    Args:
        x: (n, in), in the dtype of the result.
        dropped: x after dropout, which A gets; it may be x itself.
        weight: W (out, in); may be a transposed view.
        bias: (out,) or None.
        a: A (r, in), in any dtype.
        b: B (out, r), in any dtype.
        scaling: s.
    """
    if _autocasts(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    other = None if dropped is x else dropped
    output, _ = LowRankSum.apply(x, other, weight, bias, a.to(x.dtype), b.to(x.dtype), scaling)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x has in a product: autocast's where autocast is on, otherwise its own."""
    casts = x.is_floating_point() and x.dtype != torch.float64 and _autocasts(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class LowRankSum(torch.autograd.Function):
    """The operation on matrices of one dtype. It also returns h, so that a gradient of a gradient goes through h."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # torch inspects and binds named ones anew at each call
        x, dropped, weight, bias, a, b, scaling = inputs
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        h = torch.mm(x if dropped is None else dropped, a.t())
        return y.addmm_(h, b.t(), alpha=scaling), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dropped, weight, _, a, b, ctx.scaling = inputs
        x_needs, dropped_needs, weight_needs, _, a_needs, b_needs, _ = ctx.needs_input_grad
        ctx.drops = dropped is not None
        seen, seen_needs = (dropped, dropped_needs) if ctx.drops else (x, x_needs)
        ctx.save_for_backward(
            x if weight_needs else None,
            seen if a_needs else None,
            weight if x_needs else None,
            a if seen_needs else None,
            b if seen_needs or a_needs or b_needs else None,
            output[1] if b_needs else None,
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients for those of y and of h; the latter is None unless this is a gradient of a gradient."""
        x, seen, weight, a, b, h = ctx.saved_tensors
        x_needs, dropped_needs, weight_needs, bias_needs, a_needs, b_needs, _ = ctx.needs_input_grad
        seen_needs = dropped_needs if ctx.drops else x_needs
        dx = d_seen = d_weight = d_bias = da = db = None
        if g is not None:
            # beta=0 ignores the first argument, which must broadcast with the product.
            if seen_needs or a_needs:
                of_y = torch.addmm(b[:1].detach(), g, b, beta=0, alpha=ctx.scaling)
                u = of_y if u is None else u + of_y
            db = torch.addmm(b[:1].detach(), g.t(), h, beta=0, alpha=ctx.scaling) if b_needs else None
            d_weight = torch.mm(g.t(), x) if weight_needs else None
            d_bias = g.sum(0) if bias_needs else None
        if u is not None:
            da = torch.mm(u.t(), seen) if a_needs else None
            d_seen = torch.mm(u, a) if seen_needs else None
        if ctx.drops:
            dx = torch.mm(g, weight) if x_needs and g is not None else None
            return dx, d_seen, d_weight, d_bias, da, db, None
        if d_seen is not None and g is not None:
            add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
            d_seen = add(d_seen, g, weight)
        return d_seen, None, d_weight, d_bias, da, db, None


def _class_of(tensor: Tensor) -> type:
    return torch.Tensor if type(tensor) is nn.Parameter else type(tensor)
