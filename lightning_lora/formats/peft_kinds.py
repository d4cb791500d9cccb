"""Which kind of layer PEFT's tensors belong to, as far as their names and shapes tell it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..adapter.adapter import Adapter
from ..adapter.values import refuse_nested
from ..errors import LoRAError
from ..names import A, B
from ..nn.lora import EMBEDDING_A
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, CONV, EMBEDDING
from .peft_equivalents import check_peft_version

OUTPUT_A = "base_layer.out_proj.lora_A.weight"  # how PEFT's name of attention's out_proj ends


def kinds_of(
    tensors: Mapping[str, torch.Tensor], peft_names: Mapping[str, str], peft_version: object, where: object
) -> dict[str, str]:
    """Return the kind of each layer whose kind PEFT's names and the factors' shapes tell.

    Args:
        tensors: by our names.
        peft_names: PEFT's name of each, without an adapter's name.
        peft_version: the version of peft that wrote them, if known.
        where: for messages.

    Raises:
        LoRAError: a layer is of a kind that cannot be applied.
    """
    refuse_nested(tensors, where)
    kinds = {}
    adapter = Adapter(tensors)
    for name in adapter.layers:
        if adapter.is_parameter(name):
            continue  # its model tells whether it is a stack, and whether that is transposed
        if f"{name}.{A}" not in tensors:
            continue
        if peft_names[f"{name}.{A}"].endswith(EMBEDDING_A):
            kinds[name] = EMBEDDING
        elif peft_names[f"{name}.{A}"].endswith(OUTPUT_A):
            kinds |= {name: ATTENTION_OUTPUT, name.rpartition(".")[0]: ATTENTION}
            check_peft_version(peft_version, where)
        a, b = tensors[f"{name}.{A}"], tensors.get(f"{name}.{B}")
        if a.dim() > 2 and b is not None and b.dim() == a.dim():
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
