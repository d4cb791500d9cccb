"""Buffers for the merge arithmetic, because fresh pages cost more than the arithmetic."""

from __future__ import annotations

import torch


class Scratch:
    """Buffers that every block of a weight uses again."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.device = weight.device
        self.difference = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, like: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of that shape, valid until the name is taken again."""
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < like.numel():
            buffer = self.buffers[name, dtype] = torch.empty(like.numel(), dtype=dtype, device=self.device)
        return buffer[: like.numel()].view(like)

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """values in another dtype, in a buffer; the same tensor where it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values.shape, dtype).copy_(values)
