"""Random numbers from streams of their own: no stream of the user's, of any device, is seeded or advanced.

torch.manual_seed would seed every device, and torch.random.fork_rng gives back only the streams that it is told of.
"""

from __future__ import annotations

import torch


def stream(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator that gives the numbers that torch.manual_seed(seed) would let a device draw."""
    return torch.Generator(device).manual_seed(seed)


def svd_lowrank(matrix: torch.Tensor, size: int, steps: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return what torch.svd_lowrank returns after torch.manual_seed(seed), bit for bit (arXiv:0909.4061).

    Args:
        matrix: (m, n).
        size: how many singular values are searched, at most m and n.
        steps: of subspace iteration.
        seed: of the random start.

    Returns:
        U (m, size), S (size) and V (n, size).
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = svd_lowrank(matrix.mH, size, steps, seed)
        return right, values, left
    draw = stream(seed, matrix.device)
    start = torch.randn(matrix.shape[1], size, dtype=matrix.dtype, device=matrix.device, generator=draw)
    basis = leading_basis(matrix, start, steps)
    left, values, right = torch.linalg.svd(basis.mH @ matrix, full_matrices=False)
    return basis @ left, values, right.mH


def leading_basis(matrix: torch.Tensor, start: torch.Tensor, steps: int) -> torch.Tensor:
    """Return an orthonormal basis (m, k) close to the leading left singular vectors of a matrix (m, n), m >= n.

    Args:
        matrix: (m, n).
        start: (n, k), random.
        steps: of subspace iteration.
    """
    basis: torch.Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.mH @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis
