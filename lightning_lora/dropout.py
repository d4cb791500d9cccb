"""Dropout of an adapter's input features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .sharding import is_sharded

STEPS = 2**16


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Zero each element of x with probability p; returns that and the factor that keeps its expectation.

    On the CPU, torch's own dropout takes many times as long as the adapter's products. Here 16 random bits decide each
    element: p is taken to the nearest 1/65536, and the factor belongs to that p, so nothing is biased.
    """
    if x.device.type != "cpu" or is_sharded(x):
        return F.dropout(x, p), 1.0
    steps = min(max(round(p * STEPS), 1), STEPS - 1)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64, device=x.device)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(bits < steps - STEPS // 2, 0), STEPS / (STEPS - steps)
