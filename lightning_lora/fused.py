"""enable_lora for readers that know plain LoRA only: the adapted parts of a fused projection as one adapter.

n parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r with the same A and a B that is block
diagonal, with zero rows for the parts that are left alone. The scaling stays, so lora_alpha grows with the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .adapter import Adapter
from .base import A, B
from .errors import LoRAError
from .supported import enabled_parts


def without_parts(adapter: Adapter) -> Adapter:
    """The same adapter with each B as wide as plain LoRA has it."""
    return _with_factors_b(adapter, _spread)


def with_parts(adapter: Adapter) -> Adapter:
    """The inverse of without_parts.

    Raises:
        LoRAError: a B is not zero outside its blocks, so that enable_lora cannot express it.
    """
    return _with_factors_b(adapter, _gather)


def _with_factors_b(adapter: Adapter, change: Any) -> Adapter:
    tensors: Mapping[str, Any] = adapter.tensors
    for name in adapter.layers():
        enabled = enabled_parts(name, adapter.config) if adapter.config is not None else None
        if enabled is not None:
            factor_b = change(name, tensors[f"{name}.{A}"], tensors[f"{name}.{B}"], enabled)
            tensors = {**tensors, f"{name}.{B}": factor_b}
    return replace(adapter, tensors=tensors)


def _spread(name: str, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    size, rank = b.shape[0] // sum(enabled), b.shape[1]
    wide = b.new_zeros(len(enabled) * size, sum(enabled) * rank)
    for block, part in zip(_blocks(wide, enabled), torch.split(b, size), strict=True):
        block.copy_(part)
    return wide


def _gather(name: str, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    if a.shape[0] != b.shape[1] or b.shape[1] % sum(enabled) or b.shape[0] % len(enabled):
        raise LoRAError(
            f"adapter: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit enable_lora={list(enabled)}."
        )
    narrow = torch.cat([block.clone() for block in _blocks(b, enabled)])
    if not torch.equal(_spread(name, a, narrow, enabled), b):
        raise LoRAError(
            f"adapter: {name!r}: its B is not zero outside the blocks of enable_lora={list(enabled)}; something else "
            "changed it after it was saved."
        )
    return narrow


def _blocks(wide: torch.Tensor, enabled: tuple[bool, ...]) -> list[torch.Tensor]:
    rows, columns = wide.shape[0] // len(enabled), wide.shape[1] // sum(enabled)
    adapted = [i for i, on in enumerate(enabled) if on]
    return [wide[i * rows : (i + 1) * rows, k * columns : (k + 1) * columns] for k, i in enumerate(adapted)]
