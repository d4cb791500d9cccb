"""Norms and spectra of a product left @ right, computed from its small factors only; and the SVD of a whole matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..nn.low_rank import LowRankBlock
from ..nn.random_stream import svd_lowrank

EXACT_SVD = 512  # up to this many rows or columns the whole decomposition is cheap
OVERSAMPLED, ITERATIONS = 16, 6


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (m, k), S (k) and Vh (k, n) for the k largest singular values of a matrix (m, n).

    k is `rank`, or less if the matrix is smaller. A large matrix is decomposed by random projection (arXiv:0909.4061),
    with the same result each time. The user's random stream is not advanced.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_SVD:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, v = svd_lowrank(matrix, min(rank + OVERSAMPLED, *matrix.shape), ITERATIONS, seed=0)
        right = v.T
    return left[:, :rank], values[:rank], right[:rank]


def product_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (m, k), S (k) and Vh (k, n) of left (m, k) @ right (k, n), from two QR decompositions.

    The product is never built.
    """
    (left_q, left_r), (right_q, right_r) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return left_q @ u, values, vh @ right_q.T


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the Frobenius norm of left @ right from the R factors of two QR decompositions.

    The norm has the precision of the dtype even where the terms of the product nearly cancel. The product is never
    built.
    """
    core, largest = _core(left, right)
    return float(torch.linalg.matrix_norm(core)) * float(largest) if largest else 0.0


def singular_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the singular values of left (m, k) @ right (k, n), largest first, from two QR decompositions.

    The product is never built.

    Returns:
        k values in the dtype of the factors, padded with zeros; all NaN if the product is not finite.
    """
    core, largest = _core(left, right)
    values = left.new_zeros(left.shape[1])
    if largest == 0:
        return values
    if not torch.isfinite(core).all():
        return values.fill_(math.nan)
    found = torch.linalg.svdvals(core) * largest
    values[: len(found)] = found
    return values


def _core(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a small matrix and a factor; the singular values of left @ right are those of the matrix times the factor.

    Taking the factor out keeps squares of large values from overflowing. If the factor is zero, so is the product.
    """
    left_r, right_r = torch.linalg.qr(left, mode="r")[1], torch.linalg.qr(right.T, mode="r")[1]
    largest = left_r.abs().max() if left_r.numel() else left_r.new_zeros(())  # a layer may have no inputs or outputs
    return left_r / largest @ right_r.T, largest


class Stack(NamedTuple):
    """n blocks of one shape: left (n, m, k) and right (n, k, c), float64 (on mps float32)."""

    left: torch.Tensor
    right: torch.Tensor

    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left.T @ left and right @ right.T of each block, both (n, k, k)."""
        return self.left.mT @ self.left, self.right @ self.right.mT


def stack_blocks(blocks: Sequence[LowRankBlock]) -> list[Stack]:
    """Return blocks as stacks, one for each shape, ordered by the first block of each shape."""
    shapes: dict[tuple[torch.Size, torch.Size], list[LowRankBlock]] = {}
    for block in blocks:
        shapes.setdefault((block.left.shape, block.right.shape), []).append(block)
    return [Stack(_stacked([b.left for b in each]), _stacked([b.right for b in each])) for each in shapes.values()]


def inner_product(first: Sequence[Stack], second: Sequence[Stack]) -> torch.Tensor:
    """Return the sum of products of the elements of two matrices, a scalar: sum((L1.T @ L2) * (R1 @ R2.T)).

    The matrices are never built. Both must have their blocks in the same places.
    """
    products = [
        ((stack.left.mT @ other.left) * (stack.right @ other.right.mT)).sum()
        for stack, other in zip(first, second, strict=True)
    ]
    return torch.stack(products).sum()


def singular_values_of_grams(left_gram: torch.Tensor, right_gram: torch.Tensor) -> torch.Tensor:
    """Return the singular values of n products left @ right from the Gram matrices of their factors.

    They are the square roots of the eigenvalues of left_gram @ right_gram. The error is 1e-8 of the largest possible
    singular value. QR decompositions of the factors have an error of 1e-16 and take several times as long.

    Args:
        left_gram: left.T @ left of each product, (n, k, k), float64.
        right_gram: right @ right.T of each product, (n, k, k), float64.

    Returns:
        (n, k), ascending for each product; NaN for a product with a Gram matrix that is not finite.
    """
    finite = (left_gram.isfinite() & right_gram.isfinite()).all(-1).all(-1)
    left_gram, right_gram = (torch.where(finite[:, None, None], gram, 0.0) for gram in (left_gram, right_gram))
    values, vectors = torch.linalg.eigh(right_gram)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    squares = torch.linalg.eigvalsh(root.mT @ left_gram @ root)
    return torch.where(finite[:, None], squares.clamp(min=0).sqrt(), math.nan)


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """Return exp(-sum(p log p)) over the last dimension, with p = values / sum(values); 0 where all values are zero."""
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total == 0, 1.0, total)
    return torch.where(total[..., 0] == 0, 0.0, torch.exp(-torch.special.xlogy(shares, shares).sum(-1)))


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    stack = matrices[0].detach().unsqueeze(0) if len(matrices) == 1 else torch.stack([m.detach() for m in matrices])
    return stack.to(torch.float32 if stack.device.type == "mps" else torch.float64)  # mps has no float64
