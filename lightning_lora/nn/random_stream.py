"""Random numbers from new generators: torch's own random streams are neither seeded nor advanced, on any device.

torch.manual_seed would seed every device. torch.random.fork_rng restores only the streams of the devices it is given.
"""

from __future__ import annotations

import torch


def stream(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator that draws the same numbers as the device does after torch.manual_seed(seed)."""
    return torch.Generator(device).manual_seed(seed)


def svd_lowrank(matrix: torch.Tensor, size: int, steps: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Compute torch.svd_lowrank as after torch.manual_seed(seed), bit for bit (arXiv:0909.4061).

    Args:
        matrix: (m, n).
        size: number of singular values, at most m and n.
        steps: number of steps of subspace iteration.
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
    """Return an orthonormal basis (m, k) close to the leading left singular vectors of a matrix.

    Args:
        matrix: (m, n) with m >= n.
        start: (n, k), random.
        steps: number of steps of subspace iteration.
    """
    basis: torch.Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.mH @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis
