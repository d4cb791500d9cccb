"""The norm of each output's weights in V = W + s * B @ A, without building B @ A, and the scale for another norm.

    norm(V)^2 = norm(W)^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

W is stored (out, in...), or (in, out) if it is transposed. norm(W)^2 is always summed in float64. A layer and the
command line, which reads W part by part, then find the same norm where B is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ..distributed.sharding import is_sharded, local, reduce_, window
from .exact_merge import parts_of

# If norm(V)^2 is below this share of norm(W)^2, the terms have cancelled and float32 has lost too many digits. V is
# then built for that output.
CANCELLED = 0.01

Parts = Iterable[tuple[int, torch.Tensor]]  # (first row, some rows of W as a matrix)


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
    """Return norm(V) of each output: (out,), float64 (on mps float32).

    Collective where the weight is sharded. Every rank gets the whole result.

    Args:
        weight: W; it may be sharded.
        a: A (r, in), not sharded.
        b: B (out, r), not sharded.
        scaling: s.
        transposed: whether W is stored (in, out).
        base: norm(W)^2 (out,), if known.
        exact: whether to compute in float64 throughout.
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
    """Return norm(V) of each output, (out,) in float64, for a weight that is read part by part."""
    return _squares(parts, a, b, scaling, transposed, None, torch.float64).clamp_(min=0).sqrt_()


def base_squares(weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return norm(W)^2 of each output: (out,), float64 (on mps float32)."""
    return _joined([_row_squares(part, transposed) for _, part in parts_of(weight)], transposed)


def output_scale(lengths: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return c = m / norm(V), differentiable in m; 1 for an output whose weights are all zero.

    norm(V) is rounded to the dtype of m first. m was rounded in the same way when it got its initial value, so c starts
    as exactly 1.

    Args:
        lengths: m (out,).
        norms: norm(V) (out,).
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
    """Return norm(V)^2; products are computed in `dtype`."""
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
    """Join the results for parts of the rows: sum them if the weight is transposed, else concatenate them."""
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
    """Return norm(V)^2 of some outputs, for which V is built in float64."""
    dtype, matrix = _widest(weight), weight.flatten(1)
    rows = (matrix[:, outputs].T if transposed else matrix[outputs]).to(dtype)
    return (rows + scaling * (b[outputs].to(dtype) @ a.to(dtype))).square().sum(1)


def _sharded_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool
) -> torch.Tensor:
    """Return norm(V)^2 of a sharded weight. Collective."""
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
    """Return whether float32 will do, because a check for cancellation costs nothing.

    On a GPU the check would make the host wait, and in a compiled function it would break the graph.
    """
    return weight.device.type == "cpu" and weight.dtype != torch.float64 and not torch.compiler.is_compiling()


def _widest(weight: torch.Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64
