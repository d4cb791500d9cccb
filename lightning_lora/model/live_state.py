"""The live tensors of an injected model by name, listed once for a call that reads, compares or writes them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from ..distributed.sharding import detached
from ..nn.adapted_module import adapter_of, is_factor
from ..nn.foreign_linear import is_of_base
from .adapted_model import AdaptedModel
from .named_state import StateEntry


class LiveState:
    """The tensors and extra states of an injected model, by the names of its state dict.

    `changing` and `values` know what was recorded as trained. open_state records parameters that were unfrozen first.

    Attributes:
        handle: the model.
        entries: each name with its live tensor (None for extra state) and owner, see state_of.
        tensors: the live tensors by name.
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
    def changing(self) -> list[str]:
        """The names of all that training can change: factors, parameters recorded as trained, persistent buffers.

        A trainable parameter outside of the injected module is among them, too. Buffers that are a foreign linear
        layer's weight are not.
        """
        trained = self.handle.trained()
        return [
            name
            for name, tensor, owner in self.entries
            if tensor is None
            or (not isinstance(tensor, nn.Parameter) and not is_of_base(owner))
            or id(tensor) in trained
            or is_factor(name, owner)
            or (tensor.requires_grad and id(tensor) not in self._base)  # outside of the injected module
        ]

    @cached_property
    def _base(self) -> set[int]:
        return {id(each.parameter) for each in self.handle.base()}

    def values(self) -> dict[str, Any]:
        """Return the values of `changing`: detached live tensors, extra states, and W where a weight is merged now."""
        wanted = set(self.changing)
        return original_values(entry for entry in self.entries if entry[0] in wanted)


def open_state(handle: AdaptedModel) -> LiveState:
    """Record base parameters that were unfrozen since injection, and list the model's tensors.

    Example::

        live = open_state(open_model(model, "save_adapter"))
        trained = [name for name in live.changing if live.tensors[name] is not None]
    """
    handle.record_trainable()
    return LiveState(handle)


def original_values(entries: Iterable[StateEntry]) -> dict[str, Any]:
    """Return the values of entries of state_of by name, without the adapter: detached tensors, and extra states."""
    return {
        name: cast(Any, owner).get_extra_state() if tensor is None else original_value(name, tensor, owner)
        for name, tensor, owner in entries
    }


def original_value(name: str, tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return a tensor of state_of without the adapter, detached: the live one, or a restored copy of a merged weight.

    Args:
        name: in the state dict; its last segment is the name in the module.
        tensor: the live tensor.
        module: its owner.
    """
    if isinstance(tensor, nn.Parameter):
        leaf = name.rpartition(".")[2]
        adapter = adapter_of(module, leaf)
        if adapter is not None:
            return adapter.original()
    return detached(tensor)
