"""Adapters that PEFT has not, as adapters that it has: the same change of every weight.

enable_lora: n parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r with the same A and a B
that is block diagonal, with zero rows for the parts that are left alone. The scaling stays, so lora_alpha grows.

Attention's out_proj: peft adds its change twice, in forward and in merge (measured on 0.21.2; a fix is proposed in
huggingface/peft#3774). So B is halved on the way out and doubled on the way in, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .adapter import Adapter
from .base import A, B
from .errors import LoRAError

OUT_PROJ_COUNTS = 2
LAST_KNOWN_PEFT = (0, 21)

Change = Callable[[torch.Tensor], torch.Tensor]


def as_plain(adapter: Adapter) -> Adapter:
    """The equal adapter without enable_lora, as PEFT applies it."""
    return _with_factors_b(adapter, _spread, lambda b: b / OUT_PROJ_COUNTS)


def from_plain(adapter: Adapter) -> Adapter:
    """The inverse of as_plain.

    Raises:
        LoRAError: a B is not zero outside its blocks, so that enable_lora cannot express it.
    """
    return _with_factors_b(adapter, _gather, lambda b: b * OUT_PROJ_COUNTS)


def check_peft_version(version: object, where: object) -> None:
    """Refuse attention adapters of a later peft, which may add out_proj's change once.

    Raises:
        LoRAError: the version is later than those whose behaviour is known.
    """
    numbers = [int(part) if part.isdigit() else 0 for part in str(version or "0.0").split(".")[:2]]
    if tuple(numbers) > LAST_KNOWN_PEFT:
        raise LoRAError(
            f"{where}: adapts nn.MultiheadAttention and was written by peft {version}. peft up to 0.21 adds the change "
            "of out_proj twice; whether this one does is not known here. Update lightning_lora, or leave attention out."
        )


def _with_factors_b(adapter: Adapter, change: Callable[..., torch.Tensor], for_output: Change) -> Adapter:
    tensors = dict(adapter.tensors)
    for name in adapter.layers():
        enabled = adapter.config.enabled_parts(name) if adapter.config is not None else None
        key = f"{name}.{B}"
        if adapter.kinds.get(name) == "AttentionOutput":
            tensors[key] = for_output(tensors[key].detach())
        elif enabled is not None:
            tensors[key] = change(name, tensors[f"{name}.{A}"], tensors[key], enabled)
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
