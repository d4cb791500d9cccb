"""An adapter's factors by themselves: numbers, finite, of the rank and the scaling that the options say."""

from __future__ import annotations

import math

import torch

from .adapter import Adapter
from .base import A, B
from .errors import LoRAError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_factors(adapter: Adapter, where: str) -> None:
    """Compare the factors with each other and with the options.

    Raises:
        LoRAError: names the first layer whose factors are missing, not numbers, or of another rank than the options'.
    """
    for name in adapter.layers():
        if not name:
            raise LoRAError(f"{where}: a lora_A names no layer.")
        a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors.get(f"{name}.{B}")
        if b is None:
            raise LoRAError(f"{where}: {f'{name}.{B}'!r} is missing; the adapter was cut.")
        for leaf, factor in ((A, a), (B, b)):
            if not isinstance(factor, torch.Tensor) or factor.dtype not in DTYPES or factor.dim() < 2:
                found = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, torch.Tensor) else repr(factor)
                raise LoRAError(
                    f"{where}: {f'{name}.{leaf}'!r} must be a floating point tensor of two dimensions or more, "
                    f"found {found[:80]}."
                )
            if not is_finite(factor):
                raise LoRAError(f"{where}: {f'{name}.{leaf}'!r} holds NaN or Inf; a diverged run, or a damaged file.")
        _check_rank(adapter, name, where)


def _check_rank(adapter: Adapter, name: str, where: str) -> None:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    rank = b.shape[1]
    if not rank or not a.shape[0] or a.shape[0] % rank:
        raise LoRAError(f"{where}: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not share a rank.")
    if adapter.config is None:
        return
    owner = name.rpartition(".")[0] if _is_output(adapter, name) else name
    wanted = [adapter.config.scaling(n) for n in (name, owner) if adapter.config.rank(n) == rank]
    if not wanted:
        raise LoRAError(
            f"{where}: {name!r}: the options say r={adapter.config.rank(name)}, but its factors have rank {rank}: "
            f"A {tuple(a.shape)}, B {tuple(b.shape)}."
        )
    scaling = adapter.scalings.get(name, wanted[0])
    if not any(math.isclose(scaling, s) for s in wanted):
        raise LoRAError(
            f"{where}: {name!r}: the options say a scaling (lora_alpha over r) of {wanted[0]:g}, but {scaling:g} is "
            "recorded; the file is damaged."
        )


def _is_output(adapter: Adapter, name: str) -> bool:
    """Whether a layer is the out_proj of an adapted attention, which has the attention's options in PEFT."""
    attention, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and f"{attention}.{A}" in adapter.tensors


def is_finite(value: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; a tensor without values (meta) counts as finite."""
    numbers = value if value.dtype in DTYPES else value.double()  # isfinite does not know float8
    return value.is_meta or bool(torch.isfinite(numbers).all())
