"""How B @ A lies in the weight of each kind of layer, for live layers, shards, files on disk and PEFT's forms.

    kind                       weight, as stored       A                     B
    Linear, AttentionOutput    (out, in)               (r, in)               (out, r)
    Conv1D, Embedding          (in, out)               (r, in)               (out, r)
    Conv, GroupedConv          (out, in/groups, k...)  (r, in/groups, k...)  (out, r, 1...)
    MultiheadAttention         in_proj (3E, E)         (r, E)                (3E, r)
    Parameter                  (m, n)                  (r, n)                (m, r)
    Experts                    (E, m, n)               (E * r, n)            (E * m, r)
    TransposedExperts          (E, m, n)               (E * r, m)            (E * n, r)

In a fused projection with n of m equal parts adapted, A is (n * r, in) and B is (n * out / m, r). In a stack of E
experts each matrix has its own factors, stacked one below the other; a transposed expert's matrix is stored (in, out).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch

from ..distributed.flat import Window
from ..names import A, B

HALF = (torch.float16, torch.bfloat16)
MERGEABLE_DTYPES = (*HALF, torch.float32, torch.float64)

LINEAR, CONV1D, EMBEDDING, CONV, GROUPED_CONV = "Linear", "Conv1D", "Embedding", "Conv", "GroupedConv"
ATTENTION, ATTENTION_OUTPUT = "MultiheadAttention", "AttentionOutput"
PARAMETER, EXPERTS, TRANSPOSED_EXPERTS = "Parameter", "Experts", "TransposedExperts"


class Kind(NamedTuple):
    """A kind of layer or of single parameter: how its weight is stored, and what can be done with it.

    Attributes:
        name: as files have it.
        layout: how the weight is stored: "(out, in)", "(in, out)", "kernel" for (out, in, k...), or "stack" for one
            matrix an expert.
        single: whether it is a single parameter, and no layer.
        fusable: whether enable_lora can adapt some of the outputs.
        starts: whether A and B can start from the weight. They can where A and B are the factors of the matrices of
            adapted_parts, one below the other and reshaped. In another order the start is wrong and no output shows
            it, because A0 and B0 are subtracted again. Set it only where a test of starts covers the kind.
    """

    name: str
    layout: Literal["(out, in)", "(in, out)", "kernel", "stack"]
    starts: bool
    single: bool = False
    fusable: bool = False


TABLE = (
    Kind(LINEAR, "(out, in)", starts=True, fusable=True),
    Kind(CONV1D, "(in, out)", starts=True, fusable=True),
    Kind(EMBEDDING, "(in, out)", starts=True),
    Kind(CONV, "kernel", starts=True),
    Kind(GROUPED_CONV, "kernel", starts=True),
    Kind(ATTENTION, "(out, in)", starts=True, fusable=True),
    Kind(ATTENTION_OUTPUT, "(out, in)", starts=True),
    Kind(PARAMETER, "(out, in)", starts=True, single=True),
    Kind(EXPERTS, "stack", starts=True, single=True),
    Kind(TRANSPOSED_EXPERTS, "stack", starts=True, single=True),
)
KINDS = tuple(kind.name for kind in TABLE)
TRANSPOSED = tuple(kind.name for kind in TABLE if kind.layout == "(in, out)")
CONVOLUTIONS = tuple(kind.name for kind in TABLE if kind.layout == "kernel")
STACKS = tuple(kind.name for kind in TABLE if kind.layout == "stack")
SINGLE = tuple(kind.name for kind in TABLE if kind.single)
FUSABLE = tuple(kind.name for kind in TABLE if kind.fusable)
STARTED = tuple(kind.name for kind in TABLE if kind.starts)

IN_PROJ, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")
ATTENTION_WEIGHTS = (IN_PROJ, *SEPARATE)

EVERYTHING = slice(0, sys.maxsize)

Shape = Sequence[int]
Enabled = tuple[bool, ...] | None


class LowRankBlock(NamedTuple):
    """A low-rank change of part of a weight W.

    left (m, k) @ right (k, n) is added to W[row : row + m, col : col + n], and the sum is multiplied by scale. W is
    viewed as a matrix (rows, everything else); the experts of a stack lie one below the other. Blocks of one weight do
    not overlap. Where there are `values` (m, n), they take W's place there, and k is 0: nothing is added to them.

    In a flat slice of W, which has one dimension, the block begins at element `row`, and its rows are `stride` apart.
    """

    row: int
    col: int
    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor | None = None  # (m, 1) or (1, n)
    values: torch.Tensor | None = None
    stride: int = 0  # 0: W is a matrix

    def part(self, rows: slice, columns: slice) -> LowRankBlock:
        """Return the block cut to some of its rows and columns; `row` and `col` stay those of the whole block."""
        scale = self.scale
        if scale is not None:
            scale = scale[rows] if scale.shape[0] > 1 else scale
            scale = scale[:, columns] if scale.shape[1] > 1 else scale
        values = None if self.values is None else self.values[rows, columns]
        return self._replace(left=self.left[rows], right=self.right[:, columns], scale=scale, values=values)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, which mps does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def matrix_shape(kind: str, shape: Shape) -> tuple[int, int]:
    """Return (out, in) of a weight stored in this shape; a convolution's kernel size counts to in.

    Raises:
        ValueError: the shape has the wrong number of dimensions for the kind.
    """
    if kind in CONVOLUTIONS:
        out, *inputs = shape
        return out, math.prod(inputs)
    rows, columns = shape
    return (columns, rows) if kind in TRANSPOSED else (rows, columns)


def matrix_view(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a matrix (out, in), a view of it; a convolution's kernel is flattened."""
    matrix = weight.flatten(1)
    return matrix.T if kind in TRANSPOSED else matrix


def shard_dims(kind: str) -> dict[int, tuple[str, int]]:
    """Return the factor, and the dimension of it, that each of a weight's first two dimensions comes from."""
    return {0: (A, 1), 1: (B, 0)} if kind in TRANSPOSED else {0: (B, 0), 1: (A, 1)}


def factor_shapes(
    kind: str, shape: Shape, rank: int, enabled: Enabled = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B.

    Args:
        kind: one of KINDS.
        shape: of the layer's weight as stored.
        rank: r.
        enabled: which equal parts of a fused projection are adapted; None for the whole projection.

    Raises:
        ValueError: the weight has the wrong number of dimensions for the kind.
    """
    if kind in STACKS:
        experts, *matrix = shape
        rows, columns = reversed(matrix) if kind == TRANSPOSED_EXPERTS else matrix
        return (experts * rank, columns), (experts * rows, rank)
    if kind in CONVOLUTIONS:
        out, inputs, *kernel = shape
        return (rank, inputs, *kernel), (out, rank, *[1] * len(kernel))
    out, inputs = matrix_shape(kind, shape)
    parts = enabled or (True,)
    return (sum(parts) * rank, inputs), (out // len(parts) * sum(parts), rank)


def low_rank_blocks(
    kind: str, shape: Shape, a: torch.Tensor, b: torch.Tensor, enabled: Enabled = None
) -> list[LowRankBlock]:
    """Return the blocks that B @ A adds to the weight, without the scaling. Arguments are those of factor_shapes."""
    if kind in STACKS:
        pairs = zip(*stack_factors(kind, shape, a, b), strict=True)
        return [LowRankBlock(i * shape[1], 0, left, right) for i, (left, right) in enumerate(pairs)]
    a, b = a.flatten(1), b.flatten(1)
    height = b.shape[0] // sum(enabled or (True,))
    firsts = [i * height for i, on in enumerate(enabled or (True,)) if on]
    parts = zip(firsts, torch.split(b, height), torch.split(a, b.shape[1] if enabled else len(a)), strict=True)
    return [
        LowRankBlock(0, first, right.T, left.T) if kind in TRANSPOSED else LowRankBlock(first, 0, left, right)
        for first, left, right in parts
    ]


def stack_factors(kind: str, shape: Shape, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left (E, m, r) and right (E, r, n), whose product B @ A adds to a stack (E, m, n)."""
    experts, rank = shape[0], b.shape[1]
    stacked_a, stacked_b = a.view(experts, rank, a.shape[1]), b.view(experts, -1, rank)
    return (stacked_a.mT, stacked_b.mT) if kind == TRANSPOSED_EXPERTS else (stacked_b, stacked_a)


def stack_ranks(
    a: torch.Tensor, b: torch.Tensor, other_a: torch.Tensor, other_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B whose product is the sum of two pairs' products.

    Both pairs belong to the same kind of layer. A may hold the factors of several parts, one below the other.
    """
    rank, other_rank = b.shape[1], other_b.shape[1]
    if a.shape[0] == rank:
        return torch.cat([a, other_a]), torch.cat([b, other_b], 1)
    parts = [a.reshape(-1, rank, *a.shape[1:]), other_a.reshape(-1, other_rank, *a.shape[1:])]
    return torch.cat(parts, 1).flatten(0, 1), torch.cat([b, other_b], 1)


def halve_ranks(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the two pairs that stack_ranks has joined, if they have the same rank."""
    parts = a.reshape(-1, b.shape[1], *a.shape[1:]).chunk(2, 1)
    return [(part.flatten(0, 1), half) for part, half in zip(parts, b.chunk(2, 1), strict=True)]


def adapted_parts(kind: str, weight: torch.Tensor, enabled: Enabled = None) -> list[torch.Tensor]:
    """Return each matrix (out, in) that has its own factors, as a view of the weight."""
    if kind in STACKS:
        return list(weight.mT if kind == TRANSPOSED_EXPERTS else weight)
    matrix = matrix_view(kind, weight)
    if enabled is None:
        return [matrix]
    return [part for part, on in zip(matrix.chunk(len(enabled)), enabled, strict=True) if on]


def crop(blocks: Sequence[LowRankBlock], rows: slice, columns: slice = EVERYTHING) -> list[LowRankBlock]:
    """Return the parts of a weight's blocks that overlap with a window; positions count from the window's corner.

    Args:
        blocks: of the whole weight.
        rows: start and stop of the window's rows.
        columns: start and stop of the window's columns, in the weight viewed as (rows, everything else).
    """
    cropped = []
    for block in blocks:
        row, col, left, right, *_ = block
        if row >= rows.stop or row + len(left) <= rows.start:
            continue  # at once: a table may have thousands of blocks
        top, bottom = max(row, rows.start), min(row + left.shape[0], rows.stop)
        begin, end = max(col, columns.start), min(col + right.shape[1], columns.stop)
        if top < bottom and begin < end:
            part = block.part(slice(top - row, bottom - row), slice(begin - col, end - col))
            cropped.append(part._replace(row=top - rows.start, col=begin - columns.start))
    return cropped


def crop_to_window(blocks: Sequence[LowRankBlock], part: Window) -> list[LowRankBlock]:
    """Return the parts of a weight's blocks that overlap with a part of a shard; positions are those in the shard."""
    inside = crop(blocks, part.rows, part.columns)
    if part.begin is None:
        return inside
    stride = part.values.shape[1]  # a flat slice, in which the part's matrix begins at element `begin`
    return [each._replace(row=part.begin + each.row * stride + each.col, col=0, stride=stride) for each in inside]


def columns_of(kind: str, shape: Shape) -> int:
    """Return the number of columns of a weight of this kind and shape, seen as the matrix of LowRankBlock."""
    return shape[-1] if kind in STACKS else math.prod(shape[1:])


def row_blocks(numbers: Sequence[int], rows: torch.Tensor) -> list[LowRankBlock]:
    """Return blocks with which rows (n, columns) take the place of a table's rows of these ascending numbers.

    Neighbouring rows are one block.
    """
    firsts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    left, right = rows.new_empty(len(rows), 0), rows.new_empty(0, rows.shape[1])
    return [
        LowRankBlock(numbers[first], 0, left[first:last], right, values=rows[first:last])
        for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True)
    ]


def dense_delta(blocks: Sequence[LowRankBlock], shape: torch.Size) -> torch.Tensor:
    """Return the sum of blocks without a scale as one tensor in the weight's shape, differentiable."""
    row, col, left, right, *_ = blocks[0]
    if len(blocks) == 1 and left.shape[0] * right.shape[1] == shape.numel():
        return (left @ right).view(shape)
    delta = left.new_zeros(shape[0], shape.numel() // shape[0])
    for row, col, left, right, *_ in blocks:
        delta[row : row + left.shape[0], col : col + right.shape[1]] = left @ right
    return delta.view(shape)


def to_block_diagonal(b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    """Return B (out, n * r) of the plain adapter of rank n * r that equals n enabled parts. Its A is the same.

    Differentiable.
    """
    rows = b.shape[0] // sum(enabled)
    parts = iter(torch.split(b, rows))
    blocks = [next(parts) if on else b.new_zeros(rows, 0) for on in enabled]
    return cast(torch.Tensor, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


def from_block_diagonal(b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    """Undo to_block_diagonal. Values outside the blocks are dropped."""
    rows, rank = b.shape[0] // len(enabled), b.shape[1] // sum(enabled)
    adapted = [i for i, on in enumerate(enabled) if on]
    return torch.cat([b[i * rows : (i + 1) * rows, k * rank : (k + 1) * rank] for k, i in enumerate(adapted)])
