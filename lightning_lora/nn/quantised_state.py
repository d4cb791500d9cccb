"""The entries of a state dict that describe a quantised weight of bitsandbytes, and how to load them.

A 4-bit layer writes `weight.absmax`, `weight.quant_state.bitsandbytes__nf4` and others. Its own load_state_dict refuses
these as unexpected. An 8-bit layer writes `SCB` and `weight_format`, and refuses them after its first forward.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import LoRAError
from ..names import LIGHTNING, canonical, derives_from
from .adapted_weights import NamedModules
from .quantised import BITSANDBYTES, INT8, quantised_as, quantised_parameters, scales_of, shape_of

SCALES, FORMAT, STATE = "SCB", "weight_format", ".quant_state"
LAYERS_OF_LIGHTNING = ("_Linear4bit", "_Linear8bitLt")  # classes that Lightning's BitsandbytesPrecision makes


def owner_of(name: str) -> str:
    """Return the name of the weight that an entry of a state dict would describe."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight".lstrip(".") if leaf in (SCALES, FORMAT) else path.removesuffix(STATE)


def quantisation_entries(names: Iterable[str], weights: Collection[str]) -> set[str]:
    """Return the names of entries that describe quantised weights.

    Args:
        names: of a state dict.
        weights: names of the quantised weights.
    """
    return {name for name in names if owner_of(name) in weights}


def load_quantisation_(places: NamedModules, state_dict: dict[str, Any], prefix: str) -> None:
    """Load quantised weights together with the entries that describe them. In place.

    The entries are removed from the state dict. Entries that do not fit the model stay in it, for torch's strict check.

    Args:
        places: every module of the loading model, under every name, including the name segments of wrappers.
        state_dict: changed too.
        prefix: of the model's names in the state dict.

    Raises:
        LoRAError: a 4-bit weight has another shape in the model.
    """
    quantised = [(path, module, weights) for path, module in places if (weights := quantised_parameters(module))]
    if not quantised:
        return
    owners: dict[str, list[str]] = {}
    for name in state_dict:
        owners.setdefault(owner_of(name), []).append(name)
    for path, module, weights in quantised:
        for leaf, weight in weights.items():
            name = prefix + (f"{path}.{leaf}" if path else leaf)
            entries = owners.get(name) or owners.get(prefix + canonical(name[len(prefix) :]), [])
            if not entries or not isinstance(state_dict.get(name), torch.Tensor):
                continue
            if quantised_as(weight) == INT8:
                _load_8bit_(module, weight, name, entries, state_dict)
            else:
                _load_4bit_(module, weight, name, entries, state_dict)


def _load_4bit_(module: Any, weight: Any, name: str, entries: list[str], state_dict: dict[str, Any]) -> None:
    values = {
        entry.partition(f"{canonical(name)}.")[2] or entry[len(name) + 1 :]: state_dict[entry] for entry in entries
    }
    if not any(key.startswith(STATE[1:]) for key in values):
        return
    device, packed = weight.device, state_dict[name]
    state = sys.modules[f"{BITSANDBYTES}.functional"].QuantState.from_dict(values, device=device)
    if torch.Size(state.shape) != shape_of(weight):
        raise LoRAError(
            f"load_state_dict: {name!r} is a 4-bit weight of shape {tuple(state.shape)}, in the model "
            f"{tuple(shape_of(weight))}; the state dict belongs to another model."
        )
    for entry in entries:
        del state_dict[entry]
    if packed.data_ptr() != weight.data_ptr():
        weight.data = packed.detach().to(device, copy=True)
    weight.quant_state = module.quant_state = state
    weight.quant_type, weight.blocksize, weight.compress_statistics = state.quant_type, state.blocksize, state.nested
    weight.bnb_quantized = True
    state_dict[name] = weight


def _load_8bit_(module: Any, weight: Any, name: str, entries: list[str], state_dict: dict[str, Any]) -> None:
    scales = next((entry for entry in entries if entry.endswith(SCALES)), None)
    if scales is None or state_dict[name].shape != weight.shape:
        return
    values = state_dict.pop(scales)
    if weight.dtype.is_floating_point:  # not quantised yet
        weight.data = state_dict[name].detach().to(weight.device, copy=True)
        weight.CB, weight.SCB = weight.data, values.detach().to(weight.device, copy=True)
    else:
        scales_of(module, weight).copy_(values)


def is_of_lightning(module: nn.Module) -> bool:
    """Return whether Lightning's BitsandbytesPrecision has made a layer."""
    return any(derives_from(module, name, LIGHTNING) for name in LAYERS_OF_LIGHTNING)


def unchanged_weight(module: nn.Module, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the entry for a state dict that leaves a module's tensor as it is: normally the tensor itself.

    Layers of Lightning's BitsandbytesPrecision would quantise a loaded tensor again. They do nothing with one that has
    a quantised dtype, so for them the entry is an empty tensor of that dtype.
    """
    if not quantised_as(tensor) or not is_of_lightning(module):
        return tensor
    return torch.empty(0, dtype=torch.int8 if quantised_as(tensor) == INT8 else torch.uint8)
