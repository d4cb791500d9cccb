"""norm(V) of each output's weights in V = W + s * B @ A.

V is formed piece by piece, by one product that adds to W, in float32 or wider. No terms cancel, and V takes little
memory. A norm below TINY counts as TINY, so that an output whose weights are all zero has a finite scale m / norm(V).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..distributed.flat import Window, unsharded_shape
from ..distributed.sharding import is_spread, sum_over_shards, windows
from .autocast import without_autocast
from .low_rank import widest_dtype
from .transforms import is_tracing

# Elements of V that are formed at a time. On the CPU a piece stays in the cache from one operator to the next.
PIECE_ON_CPU, PIECE = 2**17, 2**24
TINY = 2.0**-24  # float16 has no smaller number


@torch.no_grad()
def output_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return norm(V) of each output: (out,), float32 or float64.

    Args:
        weight: W as a matrix (out, in), not sharded; may be a transposed view.
        a: A (r, in).
        b: B (out, r).
        scaling: s.
    """
    transposed = weight.stride(0) < weight.stride(1)
    stored, left, right = (weight.T, a.T, b.T) if transposed else (weight, b, a)
    dtype, inputs = torch.promote_types(weight.dtype, torch.float32), 0 if transposed else 1
    left, right = left.to(dtype), right.to(dtype)
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(stored, left)]
    if not is_tracing():  # it warns of each size that is read
        size = PIECE_ON_CPU if stored.is_cpu and not torch.compiler.is_compiling() else PIECE
        rows = max(1, size // max(1, stored.shape[1]))
        pieces = zip(torch.split(stored, rows), torch.split(left, rows), strict=True)
    with without_autocast(weight.device.type):
        norms = [
            _norms(torch.addmm(piece.to(dtype), piece_left, right, alpha=scaling), inputs)
            for piece, piece_left in pieces
        ]
    if len(norms) == 1:
        return norms[0].clamp_(min=TINY)
    return (_norms(torch.stack(norms), 0) if transposed else torch.cat(norms)).clamp_(min=TINY)


def norms_of_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, *, transposed: bool
) -> torch.Tensor:
    """Return norm(V) of each output, (out,), for W as it is stored: sharded, flat or neither. A and B are not sharded.

    Collective where W is sharded. Every rank gets the whole result.
    """
    if not is_spread(weight):
        return output_norms(weight.flatten(1).T if transposed else weight.flatten(1), a, b, scaling)
    parts = windows(weight, unsharded_shape(weight)[1:].numel())
    return sum_over_shards(squares_of_windows(parts, a, b, scaling, transposed=transposed), weight).sqrt()


def squares_of_windows(
    parts: Iterable[Window], a: torch.Tensor, b: torch.Tensor, scaling: float, *, transposed: bool
) -> torch.Tensor:
    """Return the squares of the norms over some windows of W alone: (out,), float64 (on mps float32)."""
    dtype = widest_dtype(b.device)
    squares = torch.zeros(len(b), dtype=dtype, device=b.device)
    for part, rows, columns, _ in parts:
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        norms = output_norms(part.T if transposed else part, a[:, inputs], b[outputs], scaling)
        squares[outputs] += norms.to(dtype).square()
    return squares


def _norms(v: torch.Tensor, dim: int) -> torch.Tensor:
    """Return norms over a dimension. The memory of v may be reused."""
    # torch's own norm takes ten times as long on the CPU over dim 0, and rounds at each value.
    return v.square_().sum(dim).sqrt_() if v.is_cpu else torch.linalg.vector_norm(v, dim=dim)
