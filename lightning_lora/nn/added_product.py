"""base + s * B h, added in place to the outputs of a base that computes them itself, as one operation for autograd.

Such bases are quantised linear layers, convolutions and tables. One kernel adds the product and two give the gradients
of h and B. autograd's own way takes tensors of the outputs' size for the product and for its gradient.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

Tensor = torch.Tensor


def add_product(
    base: Tensor,
    hidden: Tensor,
    b: Tensor,
    scaling: float,
    dim: int = -1,
    groups: int = 1,
    ignored: Tensor | None = None,
) -> Tensor:
    """Return base + s * B h in the memory of `base`, which nothing else may use any more.

    Args:
        base: the outputs of the base; `dim` counts the features of an output.
        hidden: h, with groups * r features along `dim`, and otherwise in the shape of `base`.
        b: B (out, r) or (out, r, 1...). Each group of outputs sees its own r features of h.
        scaling: s.
        dim: of the features.
        groups: how many equal groups of features there are.
        ignored: at which places the product gives h and B no gradient, in a shape that broadcasts with `base`.
    """
    if not (base.is_contiguous() or _lies_in_rows(base, dim)):
        base = base.contiguous()
    factors = hidden.to(base.dtype), b.to(base.dtype)
    output = AddedProduct.apply(base, *factors, scaling, dim, groups, ignored)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class AddedProduct(torch.autograd.Function):
    """The operation. All tensors but `ignored` have one dtype, and `base` lies in rows or is contiguous."""

    @staticmethod
    def forward(  # type: ignore[override]
        base: Tensor, hidden: Tensor, b: Tensor, scaling: float, dim: int, groups: int, ignored: Tensor | None
    ) -> Tensor:
        output = base.detach()  # not `base` marked as changed, which torch.func's forward mode refuses
        rows = _lies_in_rows(output, dim)
        h = _matrices(hidden, dim, groups, rows)
        _add_products(_matrices(output, dim, groups, rows), _factors(b, groups, len(h)), h, scaling)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, hidden, b, ctx.scaling, ctx.dim, ctx.groups, ignored = inputs
        ctx.rows = _lies_in_rows(output, ctx.dim)
        ctx.save_for_backward(hidden, b, ignored)
        ctx.save_for_forward(hidden, b, ignored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b, ignored = ctx.saved_tensors
        _, hidden_needs, b_needs, *_ = ctx.needs_input_grad
        seen = g if ignored is None else g.masked_fill(ignored, 0)  # even where g is not finite
        grads = _matrices(seen, ctx.dim, ctx.groups, ctx.rows)
        dh = db = None
        if hidden_needs:
            factors = _factors(b, ctx.groups, len(grads))
            if ctx.rows:  # then the gradient of h must lie in rows too
                products = _scaled(grads.mT, factors, ctx.scaling).mT
            else:
                products = _scaled(factors.mT, grads, ctx.scaling)
            dh = _from_matrices(products, hidden, ctx.dim, ctx.rows)
        if b_needs:
            products = _scaled(grads, _matrices(hidden, ctx.dim, ctx.groups, ctx.rows).mT, ctx.scaling)
            samples = len(products) // ctx.groups
            db = (products if samples == 1 else products.reshape(samples, *b.shape).sum(0)).reshape(b.shape)
        return g, dh, db, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        hidden, b, ignored = ctx.saved_tensors
        d_base, dh, db, *_ = tangents
        change: Any = 0.0
        for left, right in ((dh, b), (hidden, db)):
            if left is not None and right is not None:
                change = change + ctx.scaling * _product(left, right, ctx.dim, ctx.groups)
        if ignored is not None and isinstance(change, Tensor):
            change = change.masked_fill(ignored, 0)
        return cast(Tensor, change if d_base is None else d_base + change)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Map plain operators: a product cannot be added in place to a base's output that is the same for all."""
        return torch.vmap(_sum, in_dims, randomness=info.randomness)(*inputs), 0


def _sum(
    base: Tensor, hidden: Tensor, b: Tensor, scaling: float, dim: int, groups: int, ignored: Tensor | None
) -> Tensor:
    """Return base + s * B h by operators that torch maps and differentiates itself."""
    product = _product(hidden, b, dim, groups)
    product = product if ignored is None else torch.where(ignored, product.detach(), product)
    return torch.add(base, product, alpha=scaling)


def _product(hidden: Tensor, b: Tensor, dim: int, groups: int) -> Tensor:
    h = hidden.movedim(dim, -1).unflatten(-1, (groups, b.shape[1]))
    product = torch.einsum("...gr,gor->...go", h, b.reshape(groups, b.shape[0] // groups, b.shape[1]))
    return product.flatten(-2).movedim(-1, dim)


def _lies_in_rows(x: Tensor, dim: int) -> bool:
    """Return whether features lie side by side in memory, as in linear layers and with channels last."""
    return x.movedim(dim, -1).is_contiguous()


def _matrices(x: Tensor, dim: int, groups: int, rows: bool) -> Tensor:
    """Return x as matrices (features / groups, positions), without a copy if it lies in memory as `rows` says.

    There is one for each group, and one for each sample and group unless x lies in rows.
    """
    features = x.shape[dim] // groups
    if rows:
        moved = x.movedim(dim, -1)
        return moved.reshape(math.prod(moved.shape[:-1]), groups, features).permute(1, 2, 0)
    dim = dim % x.dim()
    return x.reshape(math.prod(x.shape[:dim]) * groups, features, math.prod(x.shape[dim + 1 :]))


def _from_matrices(matrices: Tensor, like: Tensor, dim: int, rows: bool) -> Tensor:
    """Undo _matrices."""
    if not rows:
        return matrices.reshape(like.shape)
    return matrices.permute(2, 0, 1).reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def _factors(b: Tensor, groups: int, count: int) -> Tensor:
    """Return the part of B (out / groups, r) for each of `count` matrices."""
    parts = b.reshape(groups, b.shape[0] // groups, b.shape[1])
    return parts if count == groups else parts.expand(count // groups, *parts.shape).flatten(0, 1)


def _add_products(to: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    if len(to) == 1:  # one product has faster kernels
        to[0].addmm_(left[0], right[0], alpha=scaling)
    else:
        to.baddbmm_(left, right, alpha=scaling)


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    if len(left) == 1:
        return torch.addmm(left.new_empty(1), left[0], right[0], beta=0, alpha=scaling).unsqueeze(0)
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scaling)
