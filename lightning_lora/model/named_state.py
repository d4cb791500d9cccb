"""A model's live tensors by the names of its state dict, also while it is merged or sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from ..distributed.sharding import copy_, reshard_
from ..names import canonical, names_factor
from .base_values import base_places

StateEntry = tuple[str, torch.Tensor | None, nn.Module]  # name, live tensor (None for extra state), owner


def named_state(model: nn.Module, *, raw: bool = False) -> Iterator[StateEntry]:
    """Yield the names of model.state_dict(), each with its live tensor (None for extra state) and owner.

    Unlike state_dict() this restores no merged weight, and leaves out the segments of wrappers unless `raw`. A shared
    module or parameter comes under each of its names. Sharded parameters are the shards.
    Inside disable_adapter they are the trained ones, as outside.
    """
    places = model.named_modules(remove_duplicate=False)
    yield from state_of([(name if raw else canonical(name), module) for name, module in places])


def state_of(places: Sequence[tuple[str, nn.Module]]) -> Iterator[StateEntry]:
    """Yield named_state of a model whose modules are listed, under every name."""
    reshard_(module for _, module in places)
    for prefix, module in places:
        path = f"{prefix}." if prefix else ""
        stand_ins = base_places(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield path + name, stand_ins[name].trained if name in stand_ins else parameter, module
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield path + name, stand_ins[name].trained if name in stand_ins else buffer, module
        if getattr(type(module), "get_extra_state", nn.Module.get_extra_state) is not nn.Module.get_extra_state:
            yield path + "_extra_state", None, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters without those of adapters; a shared one under its first name."""
    trained = {
        id(place.stand_in): place.trained for module in model.modules() for place in base_places(module).values()
    }
    return {
        canonical(name): cast(nn.Parameter, trained.get(id(parameter), parameter))
        for name, parameter in model.named_parameters()
        if not names_factor(name)
    }


def exchange_values_(root: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write values into the named state of a module, and return what was there. In place."""
    live = {name: tensor for name, tensor, _ in named_state(root) if tensor is not None}
    before = {name: live[name].detach().clone() for name in values if name in live}
    for name in before:
        if not values[name].is_meta:  # one on meta was recorded before there were values: nothing was trained since
            copy_(live[name], values[name])
    return before
