"""A frozen linear layer and s * (B @ A - B0 @ A0) as one operation of autograd, for training on the CPU.

Autograd on [A; A - A0] and [B - B0, B0] would form gradients of twice the rank, and keep both for backward. Here those
of A and B cost what they do in plain LoRA, what acts is built anew in backward, and the adapter's gradient of the input
is summed straight into the base's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .low_rank import acting_parts

PLAIN_FORWARD = nn.Linear.forward
PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


def can_start_linear(x: torch.Tensor, weight: torch.Tensor, *factors: torch.Tensor) -> bool:
    """Return whether start_linear can take the place of the operations one by one, and was measured to be faster.

    Compilers and exporters, autocast, torch.func and forward-mode differentiation need them one by one; so do tensors
    of other classes, as sharded ones, and a weight or a start that is trained. Without gradients nothing is gained.
    """
    weight_and_start = (weight, *factors[2:])
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not any(tensor.requires_grad for tensor in weight_and_start)
        and all(type(tensor) in PLAIN_TENSORS for tensor in (*factors[:2], *weight_and_start))
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def start_linear(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    *factors: torch.Tensor,
) -> torch.Tensor:
    """Return x @ W.T + bias + s * x @ (B @ A - B0 @ A0).T, twice differentiable but in W, A0 and B0.

    Args:
        x: (..., in), contiguous.
        dropped: what the adapter sees of x where dropout acts, in its shape; None for x itself.
        weight: W (out, in).
        bias: (out,).
        scaling: s.
        factors: A (r, in), B (out, r), A0 and B0, in any floating point dtype.
    """
    return cast(torch.Tensor, _StartLinear.apply(x, dropped, weight, bias, scaling, *factors))  # type: ignore[no-untyped-call]


class _StartLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        a: torch.Tensor,
        b: torch.Tensor,
        start_a: torch.Tensor,
        start_b: torch.Tensor,
    ) -> torch.Tensor:
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        seen = (rows if dropped is None else dropped.view(rows.shape)).t()
        factor_a, change_a, change_b, factor_b = _acting(x.dtype, a, b, start_a, start_b)
        output = F.linear(rows, weight, bias)
        hidden = torch.mm(factor_a, seen)
        output.addmm_(hidden.t(), change_b.t(), alpha=scaling)
        output.addmm_(torch.mm(change_a, seen).t(), factor_b.t(), alpha=scaling)
        ctx.scaling = scaling
        # Here, as setup_context takes three times as long.
        ctx.save_for_backward(x, dropped, weight, hidden, a, b, start_a, start_b)
        if x.dim() == 2:
            return output
        # Not a view to autograd: fully_shard's hooks on the output would be lost to an in-place change of one.
        return cast(torch.Tensor, torch.ops.aten._unsafe_view(output, (*x.shape[:-1], output.shape[-1])))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dropped, weight, hidden, *factors = ctx.saved_tensors
        of_x, of_dropped, _, of_bias, _, of_a, of_b, _, _ = ctx.needs_input_grad
        seen, shape = x if dropped is None else dropped, x.shape
        if len(shape) != 2:
            seen, grad = seen.view(-1, shape[-1]), grad.reshape(-1, grad.shape[-1])
        if not grad.is_contiguous():
            grad = grad.contiguous()
        factor_a, change_a, change_b, factor_b = _acting(x.dtype, *factors)
        grad_t = grad.t()
        of_hidden, of_change = torch.mm(change_b.t(), grad_t), torch.mm(factor_b.t(), grad_t)
        if ctx.scaling != 1:
            of_hidden, of_change = of_hidden * ctx.scaling, of_change * ctx.scaling
        grad_x = grad_dropped = grad_a = grad_b = None
        if of_x:
            grad_x = torch.mm(grad, weight)
            if dropped is None:
                grad_x.addmm_(of_hidden.t(), factor_a).addmm_(of_change.t(), change_a)
            grad_x = grad_x if len(shape) == 2 else grad_x.view(shape)
        if of_dropped:
            grad_dropped = torch.mm(of_hidden.t(), factor_a).addmm_(of_change.t(), change_a).view(shape)
        if of_a:  # A is in A and in A - A0
            grad_a = torch.mm(of_hidden + of_change, seen)
        if of_b:  # B is in B - B0 alone, which meets A @ x.T
            if torch.is_grad_enabled():
                hidden = torch.mm(factor_a, seen.t())  # with a graph of its own, for second derivatives
            grad_b = torch.mm(hidden if ctx.scaling == 1 else hidden * ctx.scaling, grad).t()
        return grad_x, grad_dropped, None, grad.sum(0) if of_bias else None, None, grad_a, grad_b, None, None


def _acting(
    dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, start_a: torch.Tensor, start_b: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return acting_parts in a dtype."""
    parts = acting_parts(a, b, start_a, start_b)
    return parts if parts[0].dtype == dtype else tuple(part.to(dtype) for part in parts)
