"""Tensors that a file holds under several names, bit for bit the same: both ends of tied weights."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch

SAMPLES = 8  # values by which tensors are told apart before they are compared whole


def equal_tables(tensors: Mapping[str, Any]) -> list[set[str]]:
    """Group the names of tensors with equal bits, of two dimensions or more. Tensors without an equal are left out."""
    alike: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.numel() and not tensor.is_meta:
            values = tensor.detach().reshape(-1)[:: max(tensor.numel() // SAMPLES, 1)].tolist()
            alike.setdefault((tensor.dtype, tensor.shape, *values), []).append(name)
    groups = []
    for names in alike.values():
        while len(names) > 1:
            group = {other for other in names if torch.equal(tensors[names[0]], tensors[other])} | {names[0]}
            groups.append(group)
            names = [name for name in names if name not in group]
    return [group for group in groups if len(group) > 1]


def ties_of(names: Set[str], tensors: Mapping[str, Any]) -> set[str]:
    """Return the names of other tables that equal one of `names`: the other ends of ties."""
    return {name for group in equal_tables(tensors) if group & names for name in group - names}
