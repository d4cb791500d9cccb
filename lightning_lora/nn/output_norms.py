"""The norm of each output's weights in V = W + s * B @ A, and the scale for another norm.

On the CPU B @ A is not built:

    norm(V)^2 = norm(W)^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

Where V is small beside W these terms cancel; such outputs are noticed and computed anew. norm(W)^2 is summed in
float64. So a layer and the command line, which reads W part by part, find the same norm where B is zero.

On a GPU noticing them would make the host wait, and float64 is slow. There V itself is formed, piece by piece, by one
product that adds to W: the sum is rounded once, and no terms cancel. Compiled and traced functions, whose graph cannot
depend on values, do the same. Where B is zero, the norms of both ways differ by an ulp or two of float32.

W is stored (out, in...), or (in, out) if it is transposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from ..distributed.flat import whole_shape
from ..distributed.sharding import is_spread, local, sum_over_shards, windows
from .exact_merge import parts_of
from .low_rank import HALF
from .transforms import is_tracing, is_transformed

# If norm(V)^2 is below this share of norm(W)^2, the terms have cancelled and float32 has lost too many digits. V is
# then built for that output.
CANCELLED = 0.01
PIECE = 2**24  # elements of V that are formed at a time

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
    """Return norm(V) of each output: (out,), float32 or float64.

    Collective where the weight is sharded. Every rank gets the whole result.

    Args:
        weight: W; it may be sharded.
        a: A (r, in), not sharded.
        b: B (out, r), not sharded.
        scaling: s.
        transposed: whether W is stored (in, out).
        base: norm(W)^2 (out,), if known; it is only used if `forms_sums` is false.
        exact: whether V is computed in a wider dtype than W's; on the CPU always in float64.
    """
    if is_spread(weight):
        return _sharded_squares(weight, a, b, scaling, transposed, exact=exact).clamp_(min=0).sqrt_()
    if forms_sums(weight):
        return _norms_of_sums(_outputs_first(weight.flatten(1), transposed), a, b, scaling, exact=exact)
    if exact or weight.dtype == torch.float64 or is_transformed():  # then no decision may depend on values
        return _squares(parts_of(weight), a, b, scaling, transposed, base, torch.float64).clamp_(min=0).sqrt_()
    base = base_squares(weight, transposed=transposed) if base is None else base
    parts = [(0, weight.flatten(1))] if weight.dtype == torch.float32 else parts_of(weight)
    squares = _squares(parts, a, b, scaling, transposed, base, torch.float32)
    cancelled = squares < CANCELLED * base
    if cancelled.any():
        outputs = cancelled.nonzero().squeeze(1)
        squares[outputs] = _direct_squares(weight, a, b, scaling, transposed, outputs)
    return squares.sqrt_()


def output_norms_of_parts(
    parts: Parts, a: torch.Tensor, b: torch.Tensor, scaling: float, *, transposed: bool
) -> torch.Tensor:
    """Return norm(V) of each output, (out,), as `output_norms` does with exact=True, of a weight read part by part."""
    parts = iter(parts)
    first, part = next(parts)
    parts = itertools.chain([(first, part)], parts)
    if not forms_sums(part):
        return _squares(parts, a, b, scaling, transposed, None, torch.float64).clamp_(min=0).sqrt_()
    squares = [_squares_of_sums(part, first, a, b, scaling, transposed, exact=True) for first, part in parts]
    return _joined(squares, transposed).sqrt()


def base_squares(weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return norm(W)^2 of each output: (out,), float64."""
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
    # m / inf is 0, and so is its gradient. A value that is not finite stays so.
    return lengths / torch.threshold(norms, 0.0, math.inf) + (norms == 0)


def forms_sums(weight: torch.Tensor) -> bool:
    """Return whether the norm is taken of V itself, because no decision may depend on values."""
    return weight.device.type != "cpu" or torch.compiler.is_compiling() or is_tracing()


def _norms_of_sums(
    matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, *, exact: bool
) -> torch.Tensor:
    """Return norm(V) of each row, (out,): float32 or wider.

    V is computed and rounded like the layer's products, so in the dtype of W. `exact` computes it in the next wider
    dtype.

    Args:
        matrix: W (out, in), may be a transposed view.
    """
    dtype = _dtype_of_sums(matrix, exact=exact)
    a, b, norms = a.to(dtype), b.to(dtype), []
    for piece, piece_b in _pieces(matrix, b):
        wide = piece.to(dtype)
        add = torch.addmm if wide is piece else torch.Tensor.addmm_  # in place in a copy
        sums = add(wide, piece_b, a, alpha=scaling)
        norms.append(torch.linalg.vector_norm(sums, dim=1, dtype=_dtype_of_norms(dtype)))
        del wide, sums  # before the next piece is formed
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _dtype_of_sums(matrix: torch.Tensor, *, exact: bool) -> torch.dtype:
    """Return the dtype in which V is computed: W's, or the next wider one."""
    if not exact:
        return matrix.dtype
    return torch.float32 if matrix.dtype in HALF or matrix.device.type == "mps" else torch.float64  # mps has no float64


def _dtype_of_norms(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the norms of a V in `dtype`."""
    return torch.float32 if dtype in HALF else dtype


def _pieces(matrix: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split the rows of W and of B so that V has at most PIECE elements at a time."""
    if is_tracing():  # it warns of each size that is read
        return [(matrix, b)]
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    return list(zip(torch.split(matrix, rows), torch.split(b, rows), strict=True))


def _squares_of_sums(
    part: torch.Tensor, first: int, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool, *, exact: bool
) -> torch.Tensor:
    """Return norm(V)^2 over some rows of W as it is stored, (out,), or (rows,) if they are outputs."""
    rows = slice(first, first + len(part))
    a, b = (a[:, rows], b) if transposed else (a, b[rows])
    return _norms_of_sums(_outputs_first(part, transposed), a, b, scaling, exact=exact).square()


def _outputs_first(matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    return matrix.T if transposed else matrix


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
    if transposed:
        return part.double().square().sum(0)
    norms: torch.Tensor = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)  # without a wide copy
    return norms.square_()


def _direct_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool, outputs: torch.Tensor
) -> torch.Tensor:
    """Return norm(V)^2 of some outputs, for which V is built in float64."""
    matrix = weight.flatten(1)
    rows = (matrix[:, outputs].T if transposed else matrix[outputs]).double()
    return (rows + scaling * (b[outputs].double() @ a.double())).square().sum(1)


def _sharded_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool, *, exact: bool
) -> torch.Tensor:
    """Return norm(V)^2 of a sharded weight. Collective."""
    shard = local(weight)
    dtype = _dtype_of_norms(_dtype_of_sums(shard, exact=exact)) if forms_sums(shard) else torch.float64
    total = torch.zeros(len(b), dtype=dtype, device=shard.device)
    for part, rows, columns in windows(weight, whole_shape(weight)[1:].numel()):
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        factors = a[:, inputs], b[outputs]
        if forms_sums(part):
            total[outputs] += _squares_of_sums(part, 0, *factors, scaling, transposed, exact=exact)
        else:
            total[outputs] += _squares(parts_of(part), *factors, scaling, transposed, None, torch.float64)
    return sum_over_shards(total, weight)
