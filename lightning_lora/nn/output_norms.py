"""The norm of each output's weights in V = W + s * B @ A, without B @ A, and the scale that gives them another length.

    norm(V)^2 = norm(W)^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

W is stored (out, in...), or (in, out) where it is transposed. norm(W)^2 is always summed in float64, so that whatever
computes it, a layer or the command line part by part, finds the same norm where B is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ..distributed.sharding import is_sharded, local, reduce_, window
from .exact_merge import parts_of

CANCELLED = 0.01  # of norm(W)^2: below it float32 has lost too many digits of the sum, which is taken directly

Parts = Iterable[tuple[int, torch.Tensor]]  # some of W's rows as a matrix, each with the number of the first


def output_norms(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    transposed: bool,
    base: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Return norm(V) of each output, (out,) in float64; on mps, which has none, in float32.

    Collective where the weight is sharded; the result is whole on every rank.

    Args:
        weight: W, which may be sharded.
        a: A (r, in), whole.
        b: B (out, r), whole.
        scaling: s.
        transposed: how W is stored.
        base: norm(W)^2, if known.
        exact: compute in float64 throughout.
    """
    if is_sharded(weight):
        squares = _sharded_squares(weight, a, b, scaling, transposed)
    elif exact or not _is_quick_to_check(weight):
        squares = _squares(parts_of(weight), a, b, scaling, transposed, base, _widest(weight))
    else:
        base = base_squares(weight, transposed=transposed) if base is None else base
        parts = [(0, weight.flatten(1))] if weight.dtype == torch.float32 else parts_of(weight)
        squares = _squares(parts, a, b, scaling, transposed, base, torch.float32)
        cancelled = squares < CANCELLED * base
        if cancelled.any():
            outputs = cancelled.nonzero().squeeze(1)
            squares[outputs] = _direct_squares(weight, a, b, scaling, transposed, outputs)
        return squares.sqrt_()
    return squares.clamp_(min=0).sqrt_()


def output_norms_of_parts(
    parts: Parts, a: torch.Tensor, b: torch.Tensor, scaling: float, *, transposed: bool
) -> torch.Tensor:
    """Return output_norms for a weight that is read part by part, in float64."""
    return _squares(parts, a, b, scaling, transposed, None, torch.float64).clamp_(min=0).sqrt_()


def base_squares(weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return norm(W)^2 of each output."""
    return _joined([_row_squares(part, transposed) for _, part in parts_of(weight)], transposed)


def output_scale(lengths: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return c = m / norm(V), differentiable in m; 1 where all weights of an output are zero.

    The norm is rounded to the dtype of m, as m was when it was drawn.
    """
    norms = norms.to(lengths.dtype)
    zero = norms == 0
    return (lengths / norms.masked_fill(zero, 1.0)).masked_fill(zero, 1.0)


def _squares(
    parts: Parts,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    transposed: bool,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """norm(V)^2, its products in a dtype."""
    a, b = a.to(dtype), b.to(dtype)
    products, squares = [], []
    for first, part in parts:
        wide = part.to(dtype)
        products.append(a[:, first : first + len(part)] @ wide if transposed else wide @ a.T)
        if base is None:
            squares.append(_row_squares(part, transposed))
    wa = _joined(products, transposed)
    base = _joined(squares, transposed) if base is None else base
    terms = torch.addmm(wa.T if transposed else wa, b, a @ a.T, beta=2 * scaling, alpha=scaling**2)
    return base + terms.mul_(b).sum(1)


def _joined(values: Sequence[torch.Tensor], transposed: bool) -> torch.Tensor:
    """What parts of the rows have together: sums over them where the weight is transposed."""
    if len(values) == 1:
        return values[0]
    return torch.stack(tuple(values)).sum(0) if transposed else torch.cat(tuple(values))


def _row_squares(part: torch.Tensor, transposed: bool) -> torch.Tensor:
    wide = _widest(part)
    if transposed:
        return part.to(wide).square().sum(0)
    norms: torch.Tensor = torch.linalg.vector_norm(part, dim=1, dtype=wide)  # without a wide copy
    return norms.square_()


def _direct_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool, outputs: torch.Tensor
) -> torch.Tensor:
    """norm(V)^2 of some outputs, whose V is built."""
    dtype, matrix = _widest(weight), weight.flatten(1)
    rows = (matrix[:, outputs].T if transposed else matrix[outputs]).to(dtype)
    return (rows + scaling * (b[outputs].to(dtype) @ a.to(dtype))).square().sum(1)


def _sharded_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool
) -> torch.Tensor:
    """norm(V)^2 of a sharded weight. Collective."""
    assert is_sharded(weight)
    rows, columns, *_ = window(weight)
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    width, shard = weight.shape[2:].numel(), local(weight)
    a = a[:, inputs.start * width : inputs.stop * width]
    own = _squares(parts_of(shard), a, b[outputs], scaling, transposed, None, _widest(shard))
    total = own.new_zeros(len(b))
    total[outputs] = own
    total = total.to(weight.device_mesh.device_type)
    split = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    reduce_(total, weight.device_mesh, split, dist.ReduceOp.SUM)
    return total.to(shard.device)


def _is_quick_to_check(weight: torch.Tensor) -> bool:
    """Whether looking if sums have cancelled costs nothing, so that float32 will do: a GPU or a compiler would wait."""
    return weight.device.type == "cpu" and weight.dtype != torch.float64 and not torch.compiler.is_compiling()


def _widest(weight: torch.Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64
