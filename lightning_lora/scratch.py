"""Buffers for the merge arithmetic, because fresh pages cost more than the arithmetic."""

from __future__ import annotations

import torch

SPARE_BYTES = 64 * 2**20


class Scratch:
    """Buffers that every block of a weight uses again.

    They have `elements` in every large weight, so that each weight's buffers fit where the last one's were.
    """

    def __init__(self, weight: torch.Tensor, elements: int) -> None:
        self.device = weight.device
        self.elements = min(weight.numel(), elements)
        self.difference = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, like: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of that shape, valid until the name is taken again."""
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < like.numel():
            elements = max(self.elements, like.numel())
            buffer = self.buffers[name, dtype] = torch.empty(elements, dtype=dtype, device=self.device)
        return buffer[: like.numel()].view(like)

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """values in another dtype, in a buffer; the same tensor where it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values.shape, dtype).copy_(values)


class Spares:
    """The memory of plain copies that are done with, for the next ones: at most 64 MB, on the CPU alone.

    Another device's own allocator does the same.
    """

    def __init__(self) -> None:
        self.free: dict[tuple[torch.dtype, torch.Size, bool], list[torch.Tensor]] = {}
        self.nbytes = 0

    def copy_of(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the weight, with its strides."""
        free = self.free.get(self._key(weight)) if weight.is_contiguous() and weight.device.type == "cpu" else None
        if not free:
            return weight.detach().clone(memory_format=torch.preserve_format)
        spare = free.pop()
        self.nbytes -= spare.nbytes
        return spare.copy_(weight.detach())

    def take_back(self, copy: torch.Tensor) -> None:
        """Nothing else may use the copy from now on."""
        wanted = copy.is_contiguous() and copy.device.type == "cpu"
        if wanted and self.nbytes + copy.nbytes <= SPARE_BYTES:
            self.nbytes += copy.nbytes
            self.free.setdefault(self._key(copy), []).append(copy)

    def _key(self, tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bool]:
        return tensor.dtype, tensor.shape, tensor.is_inference()


SPARES = Spares()
