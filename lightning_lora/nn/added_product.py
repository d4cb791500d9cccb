"""base + s * B h, added in place to the outputs of a base that computes them itself, as one operation for autograd.

Such bases are quantised linear layers, convolutions and tables. One kernel adds the product and two give the gradients
of h and B. autograd's own way takes tensors of the outputs' size for the product and for its gradient.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F

from .low_rank_sum import scaled_product

Tensor = torch.Tensor


def add_product(
    base: Tensor, hidden: Tensor, b: Tensor, scaling: float, dim: int = -1, ignored: Tensor | None = None
) -> Tensor:
    """Return base + s * B h in the memory of `base`, which nothing else may use any more.

    Args:
        base: the outputs of the base; `dim` counts the features of an output.
        hidden: h, with r features along `dim`, and otherwise in the shape of `base`.
        b: B (out, r) or (out, r, 1...).
        scaling: s.
        dim: of the features.
        ignored: at which places the product gives h and B no gradient, in a shape that broadcasts with `base`.
    """
    if not (base.is_contiguous() or _lies_in_rows(base, dim)):
        base = base.contiguous()
    factors = hidden.to(base.dtype), b.to(base.dtype).flatten(1)
    output = AddedProduct.apply(base, *factors, scaling, dim, ignored)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class AddedProduct(torch.autograd.Function):
    """The operation. All tensors but `ignored` have one dtype, B is a matrix, and `base` lies in rows or is contiguous.

    With features in rows a product is one of matrices: (positions, r) @ (r, out). Otherwise it is one for each sample:
    (out, r) @ (r, positions).
    """

    @staticmethod
    def forward(base: Tensor, hidden: Tensor, b: Tensor, scaling: float, dim: int, ignored: Tensor | None) -> Tensor:
        output = base.detach()  # not `base` marked as changed, which torch.func's forward mode refuses
        if _lies_in_rows(output, dim):
            _rows(output, dim).addmm_(_rows(hidden, dim), b.t(), alpha=scaling)
        else:
            h = _samples(hidden, dim)
            _samples(output, dim).baddbmm_(b.expand(len(h), *b.shape), h, alpha=scaling)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, hidden, b, ctx.scaling, ctx.dim, ignored = inputs
        ctx.in_rows = _lies_in_rows(output, ctx.dim)
        ctx.save_for_backward(hidden, b, ignored)
        ctx.save_for_forward(hidden, b, ignored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b, ignored = ctx.saved_tensors
        _, hidden_needs, b_needs, *_ = ctx.needs_input_grad
        seen = g if ignored is None else g.masked_fill(ignored, 0)  # zero even where g is not finite
        dh = db = None
        if ctx.in_rows:
            seen, h = _rows(seen, ctx.dim), _rows(hidden, ctx.dim)
            if hidden_needs:
                dh = scaled_product(h, seen, b, ctx.scaling)
                dh = dh.reshape(hidden.movedim(ctx.dim, -1).shape).movedim(-1, ctx.dim)
            if b_needs:
                db = scaled_product(b, seen.t(), h, ctx.scaling)
        else:
            seen, h = _samples(seen, ctx.dim), _samples(hidden, ctx.dim)
            each_b = b.expand(len(h), *b.shape)
            if hidden_needs:
                dh = scaled_product(h, each_b.mT, seen, ctx.scaling).reshape(hidden.shape)
            if b_needs:
                db = scaled_product(each_b, seen, h.mT, ctx.scaling)
                db = db[0] if len(db) == 1 else db.sum(0)
        return g, dh, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        hidden, b, ignored = ctx.saved_tensors
        d_base, dh, db, *_ = tangents
        change: Any = 0.0
        for left, right in ((dh, b), (hidden, db)):
            if left is not None and right is not None:
                change = change + ctx.scaling * _product(left, right, ctx.dim)
        if ignored is not None and isinstance(change, Tensor):
            change = change.masked_fill(ignored, 0)
        return cast(Tensor, change if d_base is None else d_base + change)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Map plain operators: a product cannot be added in place to a base's output that is the same for all."""
        return torch.vmap(_sum, in_dims, randomness=info.randomness)(*inputs), 0


def _sum(base: Tensor, hidden: Tensor, b: Tensor, scaling: float, dim: int, ignored: Tensor | None) -> Tensor:
    """Return base + s * B h by operators that torch maps and differentiates itself."""
    product = _product(hidden, b, dim)
    product = product if ignored is None else torch.where(ignored, product.detach(), product)
    return torch.add(base, product, alpha=scaling)


def _product(hidden: Tensor, b: Tensor, dim: int) -> Tensor:
    return F.linear(hidden.movedim(dim, -1), b).movedim(-1, dim)


def _lies_in_rows(x: Tensor, dim: int) -> bool:
    """Return whether features lie side by side in memory, as in linear layers and with channels last."""
    return x.movedim(dim, -1).is_contiguous()


def _rows(x: Tensor, dim: int) -> Tensor:
    """Return x as (positions, features), without a copy if it lies in rows."""
    moved = x.movedim(dim, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _samples(x: Tensor, dim: int) -> Tensor:
    """Return x as (samples, features, positions), without a copy if it is contiguous."""
    dim = dim % x.dim()
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
