"""The entries of a state dict that describe a quantized weight of bitsandbytes.

A 4-bit layer writes `weight.absmax`, `weight.quant_state.bitsandbytes__nf4` and others. Its own load_state_dict refuses
these as unexpected. An 8-bit layer writes `SCB` and `weight_format`, and refuses them after its first forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from ..names import LIGHTNING, derives_from, join_names
from .quantized import INT8, quantized_as

SCALES, FORMAT, STATE = "SCB", "weight_format", ".quant_state"
LAYERS_OF_LIGHTNING = ("_Linear4bit", "_Linear8bitLt")  # classes that Lightning's BitsandbytesPrecision makes


def owner_of(name: str) -> str:
    """Return the name of the weight that an entry of a state dict would describe."""
    path, _, leaf = name.rpartition(".")
    return join_names(path, "weight") if leaf in (SCALES, FORMAT) else path.removesuffix(STATE)


def quantization_entries(names: Iterable[str], weights: Collection[str]) -> set[str]:
    """Return the names of entries that describe quantized weights.

    Args:
        names: of a state dict.
        weights: names of the quantized weights.
    """
    return {name for name in names if owner_of(name) in weights}


def is_of_lightning(module: nn.Module) -> bool:
    """Return whether Lightning's BitsandbytesPrecision has made a layer."""
    return any(derives_from(module, name, LIGHTNING) for name in LAYERS_OF_LIGHTNING)


def unchanged_weight(module: nn.Module, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the entry for a state dict that leaves a module's tensor as it is: normally the tensor itself.

    Layers of Lightning's BitsandbytesPrecision would quantize a loaded tensor again. They do nothing with one that has
    a quantized dtype, so for them the entry is an empty tensor of that dtype.
    """
    if not quantized_as(tensor) or not is_of_lightning(module):
        return tensor
    return torch.empty(0, dtype=torch.int8 if quantized_as(tensor) == INT8 else torch.uint8)
