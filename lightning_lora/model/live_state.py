"""The live tensors of an injected model by name, listed once for a call that compares them or writes into them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..nn.adapted_module import is_factor
from ..nn.adapted_weights import adapter_of
from .adapted_model import AdaptedModel
from .named_state import StateEntry


class LiveState:
    """What an injected model holds, as state dicts name it.

    Attributes:
        handle: the model.
        entries: each name with its live tensor (None for extra state) and owner, see state_of.
        tensors: the live tensors by name.

    Example::

        live = LiveState(open_model(model, "save_adapter"))
        trained = [name for name in live.keys if live.tensors[name] is not None]
    """

    def __init__(self, handle: AdaptedModel) -> None:
        self.handle = handle
        self.entries: list[StateEntry] = handle.state()
        self.tensors = {name: tensor for name, tensor, _ in self.entries}

    @cached_property
    def owners(self) -> dict[str, nn.Module]:
        """The module that owns each tensor, or extra state, by name."""
        return {name: owner for name, _, owner in self.entries}

    @cached_property
    def keys(self) -> list[str]:
        """The names of all that training can change: factors, ever-trainable parameters, persistent buffers."""
        self.handle.record_trainable()
        trained, base = self.handle.marked("trained"), {id(each.parameter) for each in self.handle.base()}
        return [
            name
            for name, tensor, owner in self.entries
            if not isinstance(tensor, nn.Parameter)
            or id(tensor) in trained
            or is_factor(name, owner)
            or (tensor.requires_grad and id(tensor) not in base)  # around the injected module
        ]

    def values(self) -> dict[str, Any]:
        """Return what `keys` names, without the adapter in it: detached tensors of the live memory, extra state."""
        wanted = set(self.keys)
        return {
            name: owner.get_extra_state() if tensor is None else original_value(name, tensor, owner)
            for name, tensor, owner in self.entries
            if name in wanted
        }


def original_value(name: str, tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return a tensor of state_of as it is without the adapter, detached: live, or a restored copy while merged."""
    if isinstance(tensor, nn.Parameter):
        leaf = name.rpartition(".")[2]
        adapter = adapter_of(module, leaf)
        if adapter is not None:
            return adapter.original(leaf)
    return tensor.detach()
