"""Magnitudes of outputs in PEFT's files: (out,), of a convolution (1, out, 1...). Ours are (out,) always."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..names import MAGNITUDE, A


def magnitudes_to_peft(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with the magnitudes in PEFT's shapes, which go by those of A."""
    return {name: _like_peft(name, tensor, tensors) for name, tensor in tensors.items()}


def magnitudes_from_peft(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo magnitudes_to_peft; what has another shape than PEFT's stays as it is."""
    return {name: _flat(tensor) if _is_magnitude(name) else tensor for name, tensor in tensors.items()}


def _like_peft(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not _is_magnitude(name):
        return tensor
    kernel = tensors[f"{name.removesuffix(MAGNITUDE)}{A}"].dim() - 2
    return tensor.view(1, -1, *[1] * kernel) if kernel else tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten() if tensor.dim() > 2 and tensor.numel() == tensor.shape[1] else tensor


def _is_magnitude(name: str) -> bool:
    return name.rpartition(".")[2] == MAGNITUDE
