"""An adapter's tensors as views of one: torch.save spends as much on each storage as some factors are large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def in_one_storage(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, copied to the CPU, all tensors of one dtype in one storage; what is no plain tensor stays."""
    places = {name: _place(value) for name, value in values.items() if _is_plain(value)}
    copies: dict[Any, torch.Tensor] = {}
    for dtype in {values[name].dtype for name in places}:
        different = {place: values[name] for name, place in places.items() if values[name].dtype == dtype}
        flat = torch.empty(sum(tensor.numel() for tensor in different.values()), dtype=dtype)
        parts = torch.split(flat, [tensor.numel() for tensor in different.values()])
        for (place, tensor), part in zip(different.items(), parts, strict=True):
            copies[place] = part.view(tensor.shape).copy_(tensor.detach())
    return {name: copies[places[name]] if name in places else value for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_meta


def _place(tensor: torch.Tensor) -> Any:
    """The same for the names of a tied tensor, which is saved once."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
