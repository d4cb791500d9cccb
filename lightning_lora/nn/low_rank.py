"""How B @ A lies in a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..distributed.sharding import is_sharded, window
from ..errors import LoRAError

HALF = (torch.float16, torch.bfloat16)


def _delta(pieces: list[Piece], shape: torch.Size) -> torch.Tensor:
    row, col, left, right = pieces[0]
    if len(pieces) == 1 and left.shape[0] * right.shape[1] == shape.numel():
        return (left @ right).view(shape)
    delta = left.new_zeros(shape[0], shape.numel() // shape[0])
    for row, col, left, right in pieces:
        delta[row : row + left.shape[0], col : col + right.shape[1]] = left @ right
    return delta.view(shape)


def cut(pieces: list[Piece], weight: torch.Tensor) -> list[Piece]:
    """The pieces of a whole weight's delta, cut to this rank's shard of it."""
    if not is_sharded(weight):
        return pieces
    rows, *rest = window(weight)
    if any(place != slice(0, size) for place, size in zip(rest[1:], weight.shape[2:], strict=True)):
        raise LoRAError(f"a weight of shape {tuple(weight.shape)} cannot be merged while it is sharded beyond dim 1")
    width = weight.shape[1:].numel() // max(weight.shape[1], 1)
    cols = slice(rest[0].start * width, rest[0].stop * width)
    cuts = []
    for row, col, left, right in pieces:
        top, bottom = max(row, rows.start), min(row + left.shape[0], rows.stop)
        begin, end = max(col, cols.start), min(col + right.shape[1], cols.stop)
        if top < bottom and begin < end:
            left, right = left[top - row : bottom - row], right[:, begin - col : end - col]
            cuts.append(Piece(top - rows.start, begin - cols.start, left, right))
    return cuts


class Piece(NamedTuple):
    """left (m, k) @ right (k, n) is added to W[row : row + m, col : col + n], W seen as (rows, everything else).

    The pieces of one weight do not overlap.
    """

    row: int
    col: int
    left: torch.Tensor
    right: torch.Tensor


IN_PROJ, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")

MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def within(pieces: Sequence[Piece], first: int, count: int) -> list[Piece]:
    """The parts of pieces that fall on some rows, counted from the first of these."""
    parts = []
    for piece in pieces:
        start, end = max(piece.row, first), min(piece.row + piece.left.shape[0], first + count)
        if start < end:
            left = piece.left[start - piece.row : end - piece.row]
            parts.append(Piece(start - first, piece.col, left, piece.right))
    return parts
