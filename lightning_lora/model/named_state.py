"""The live tensors of a model by the names of its state dict, merged and sharded models too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..distributed.flat import own_parameters
from ..distributed.sharding import reshard_
from ..names import join_names, names_factor
from ..nn.adapted_module import NamedModules
from ..nn.quantized import describe_shard

EXTRA_STATE = "_extra_state"  # torch's name of what get_extra_state returns
StateEntry = tuple[str, torch.Tensor | None, nn.Module]  # name, live tensor (None for extra state), owner


class BaseParameter(NamedTuple):
    """A parameter that belongs to no adapter, with the first module that owns it and the name in that module."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    leaf: str


def state_of(places: NamedModules) -> Iterator[StateEntry]:
    """Yield each name of a model's state dict with its live tensor and its owner.

    A merged weight is yielded as it is, where state_dict() would restore W. A shared module or parameter is yielded
    under each of its names. Sharded parameters are yielded as shards.

    Args:
        places: every module of the model, under every name.
    """
    reshard_(module for _, module in places)
    for prefix, module in places:
        path = f"{prefix}." if prefix else ""
        for leaf, tensor in own_state(module).items():
            yield path + leaf, tensor, module
        if has_extra_state(module):
            yield path + EXTRA_STATE, None, module


def has_extra_state(module: nn.Module) -> bool:
    """Return whether a module writes an extra state into state_dict()."""
    return getattr(type(module), "get_extra_state", nn.Module.get_extra_state) is not nn.Module.get_extra_state


def own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return one module's own live parameters and persistent buffers by name, without those of its children."""
    own: dict[str, torch.Tensor] = {**own_parameters(module)}
    passing = module._non_persistent_buffers_set
    return own | {name: each for name, each in module._buffers.items() if each is not None and name not in passing}


def base_parameters_of(modules: NamedModules) -> list[BaseParameter]:
    """Return a model's parameters that belong to no adapter, each once.

    Args:
        modules: every module of the model, under its first name.
    """
    found: dict[int, BaseParameter] = {}
    for prefix, module in modules:
        describe_shard(module)
        for leaf, parameter in own_parameters(module).items():
            if not names_factor(leaf):
                name = join_names(prefix, leaf)
                found.setdefault(id(parameter), BaseParameter(name, parameter, module, leaf))
    return list(found.values())
