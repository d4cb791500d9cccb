"""bias + c * (sums - bias) with a scale c for each output, as one operation for autograd on a GPU.

It is computed as sums + (c - 1) * (sums - bias). Where c is 1 the sums keep their bits, and in 16 bits c - 1 is
rounded instead of c. Backward: one kernel for the gradient of the sums, and two for that of c, which is summed in the
dtype of c. By plain operators autograd launches more kernels and reads the gradient once more.

A scale that one device computed of values from another may miss 1 by an ulp or two. So `near_one` counts as 1, but for
the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from .low_rank_sum import runs_as_one
from .transforms import may_write

Tensor = torch.Tensor


def near_one(dtype: torch.dtype) -> float:
    """Return the largest distance of a scale from 1 that counts as none on a GPU: 4 ulp of float32, or of float64."""
    return 4 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def scaled_output(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return bias + c * (sums - bias), differentiable. The memory of `sums` may be reused.

    Args:
        sums: outputs of a layer, with its bias.
        scale: c, in a shape that broadcasts with `sums`; its dtype may be wider.
        bias: in a shape that broadcasts with `sums`, or None.
    """
    if runs_as_one(sums, scale):
        return cast(Tensor, ScaledOutput.apply(sums, scale, bias)[0])  # type: ignore[no-untyped-call]
    change = (scale - 1).to(sums.dtype)
    if bias is None:
        return torch.addcmul(sums, sums, change)
    add = torch.Tensor.addcmul_ if may_write(sums) else torch.addcmul
    return add(sums, sums - bias.to(sums.dtype), change)


class ScaledOutput(torch.autograd.Function):
    """The operation. c - 1 and sums - bias are outputs too, so that the gradient of a gradient goes through them."""

    @staticmethod
    def forward(sums: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        change = F.hardshrink(scale - 1, near_one(scale.dtype)).to(sums.dtype)
        if bias is None:
            return torch.addcmul(sums, sums, change), change
        seen = sums - bias.to(sums.dtype)
        return torch.addcmul(sums, seen, change), change, seen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sums, scale, bias = inputs
        _, change, *seen = output
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.bias = ((each.shape, each.dtype) if each is not None else None for each in (scale, bias))
        saved = change, (seen[0] if seen else sums)
        ctx.save_for_backward(change, saved[1] if ctx.needs_input_grad[1] else None)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, g_change: Tensor | None = None, g_seen: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        change, seen = ctx.saved_tensors
        sums_needs, scale_needs, bias_needs = ctx.needs_input_grad
        d_sums = d_scale = d_bias = None
        if g is not None:
            d_sums = torch.addcmul(g, g, change) if sums_needs else None
            d_scale = summed_to(g * seen, *ctx.scale) if scale_needs else None
            d_bias = -summed_to(g * change, *ctx.bias) if bias_needs else None
        if g_change is not None and scale_needs:
            d_scale = plus(d_scale, g_change.to(ctx.scale[1]))
        if g_seen is not None:
            d_sums = plus(d_sums, g_seen) if sums_needs else None
            d_bias = plus(d_bias, -summed_to(g_seen, *ctx.bias)) if bias_needs else None
        return d_sums, d_scale, d_bias

    @staticmethod
    def jvp(ctx: Any, d_sums: Tensor | None, d_scale: Tensor | None, d_bias: Tensor | None) -> tuple[Tensor, ...]:
        change, seen = ctx.saved_tensors
        d_change = torch.zeros_like(change) if d_scale is None else d_scale.to(change.dtype)
        d_sums = torch.zeros_like(seen) if d_sums is None else d_sums
        d_seen = d_sums if d_bias is None else d_sums - d_bias.to(seen.dtype)
        d_output = d_sums + d_seen * change + seen * d_change
        return (d_output, d_change) if ctx.bias is None else (d_output, d_change, d_seen)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = torch.vmap(ScaledOutput.forward, in_dims)(*inputs)
        return found, (0,) * len(found)


def summed_to(values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return values summed over the dimensions in which `shape` broadcasts, in that shape and dtype."""
    first = values.dim() - len(shape)
    dims = [dim for dim in range(values.dim()) if dim < first or shape[dim - first] == 1]
    return (values.sum(dims, dtype=dtype) if dims else values.to(dtype)).view(shape)


def plus(first: Tensor | None, second: Tensor) -> Tensor:
    """Return first + second, where None counts as zero."""
    return second if first is None else first + second
