"""Which kind of layer PEFT's tensors belong to, as far as their names and shapes tell it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..names import A, B
from ..nn.low_rank import ATTENTION_OUTPUT, CONV
from .peft_equivalents import check_peft_version


def kinds_of(adapter: Adapter, in_names: Mapping[str, str], where: object) -> dict[str, str]:
    """Return the kind of each layer whose kind PEFT's names and the factors' shapes tell.

    Args:
        adapter: by its tensors alone.
        in_names: the kinds that names tell.
        where: for messages.

    Raises:
        LoRAError: a layer is of a kind that cannot be applied.
    """
    kinds = dict(in_names)
    if ATTENTION_OUTPUT in kinds.values():
        check_peft_version(adapter.peft_version, where)
    for name in adapter.module_layers:  # of a parameter its model tells whether it is a stack, and which
        a, b = adapter.tensors.get(f"{name}.{A}"), adapter.tensors.get(f"{name}.{B}")
        if a is not None and b is not None and a.dim() == b.dim() > 2:
            _refuse_crossing_groups(name, a, b, where)
            kinds[name] = CONV
    return kinds


def _refuse_crossing_groups(name: str, a: torch.Tensor, b: torch.Tensor, where: object) -> None:
    """Refuse a convolution of several groups whose A sees all input channels."""
    if b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise LoRAError(
            f"{where}: {name!r} is a convolution with {a.shape[0] // b.shape[1]} groups: A {tuple(a.shape)} sees all "
            f"input channels, B {tuple(b.shape)} one group of the rank. Their product crosses the groups: no grouped "
            "weight equals it, and it cannot be applied."
        )
