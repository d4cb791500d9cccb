"""Buffers in which a merge on the CPU computes."""

from __future__ import annotations

import torch


class Scratch:
    """Buffers that the chunks of all weights share.

    A buffer grows to the size of a full chunk with the first large weight. From then on every chunk's values lie in the
    same memory, which stays in the cache.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self.views: dict[tuple[object, ...], torch.Tensor] = {}  # views of the buffers, by buffer and shape

    def take(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor with the shape and device of `like`, valid until `name` is taken again."""
        key = name, dtype, like.device, like.shape
        view = self.views.get(key)
        if view is None:
            view = self.views[key] = self._view(key[:3], like.shape)
        return view

    def _view(self, key: tuple[str, torch.dtype, torch.device], shape: torch.Size) -> torch.Tensor:
        if torch.is_inference_mode_enabled():  # a normal tensor can be used inside and outside of inference mode
            with torch.inference_mode(False):
                return self._view(key, shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < shape.numel():
            self.views = {of: view for of, view in self.views.items() if of[:3] != key}  # frees the smaller buffer
            buffer = self.buffers[key] = torch.empty(shape.numel(), dtype=key[1], device=key[2])
        return buffer[: shape.numel()].view(shape)

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return values in another dtype, in a buffer; the tensor itself if it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values, dtype).copy_(values)
