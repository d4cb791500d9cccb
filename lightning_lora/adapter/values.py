"""What a value under a tensor's name is: whether it can be computed with, how messages describe it, and its equals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, TypeGuard

import torch

from ..errors import LoRAError
from ..nn.low_rank import MERGEABLE_DTYPES

SAMPLES = 8  # values by which tensors are told apart before they are compared whole


def is_strided(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a tensor whose numbers lie in memory side by side, neither sparse nor nested."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def holds_numbers(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a plain tensor of a floating point dtype that factors may have."""
    return is_strided(value) and value.dtype in MERGEABLE_DTYPES


def describe_value(value: object) -> str:
    """Return what a value is, for messages."""
    if not isinstance(value, torch.Tensor):
        return f"{value!r:.80}"
    if not is_strided(value):
        return "a nested tensor" if value.is_nested else f"a tensor of the layout {value.layout}"
    return f"{value.dtype} {tuple(value.shape)}" + (" without values, on the meta device" if value.is_meta else "")


def refuse_nested(tensors: Mapping[str, Any], where: object) -> None:
    """Raise LoRAError for the first nested tensor: it has no shape that could be compared with another."""
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise LoRAError(f"{where}: {name!r} must be a tensor of one shape, found {describe_value(value)}.")


def check_finite(name: str, value: torch.Tensor, where: str = "adapter") -> None:
    """Raise LoRAError where a tensor holds NaN or Inf; one without values (meta) counts as finite."""
    if not value.is_meta and not _is_finite(value.detach()):
        raise LoRAError(f"{where}: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")


def _is_finite(value: torch.Tensor) -> bool:
    numbers = value if value.dtype in MERGEABLE_DTYPES else value.double()  # isfinite does not know float8
    wide = torch.promote_types(numbers.dtype, torch.float32)
    # One pass: a sum with NaN or Inf in it is not finite. Finite values whose sum is beyond the range are rare.
    return math.isfinite(numbers.sum(dtype=wide).item()) or bool(torch.isfinite(numbers).all())


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
