"""What a value under a tensor's name is: whether it can be computed with, and how messages describe it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from ..errors import LoRAError
from ..nn.low_rank import MERGEABLE_DTYPES


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
