"""Values from before training in place of trained ones, while disable_adapter lasts.

They stand in for the trained parameters and buffers in the modules, so that nothing is written into what a forward has
saved for its backward, and parameters keep their identity, gradients and optimizers. State dicts show the trained ones
all the same, and loading changes these: they are what comes back. Sharded parameters are the exception: FSDP2 would
gather the trained ones again, so their values are exchanged in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import copy_, is_sharded, local, reshard_

PLACES = "lora_base_places"  # attribute of a module in which values stand in: its places, by name
HOOKS = "lora_base_hooks"  # attribute: handles of the hooks below


@dataclass
class BasePlace:
    """One parameter or buffer of a module, which has its value from before training."""

    tensors: dict[str, Any]  # the module's parameters or buffers
    leaf: str
    initial: Mapping[str, torch.Tensor]  # the record's of the first module with the tensor: the value is its `key`
    key: str
    name: str  # in the injected module, for messages
    trained: torch.Tensor  # what state dicts hold and what comes back; of a sharded parameter a copy
    stand_in: torch.Tensor  # what the module sees; of a sharded parameter itself
    gradient: tuple[int, int] | None = None  # that a sharded parameter had when its values were exchanged

    def put_(self) -> None:
        """Let the value from before training be there. In place."""
        live = self.tensors[self.leaf]
        if is_sharded(self.stand_in):
            if self.trained is not self.stand_in:
                return  # the other of two that are tied
            self.gradient, self.trained = _gradient_key(self.stand_in), self.stand_in.detach().clone()
        else:
            _follow_(self.stand_in, live)
        value = self.initial[self.key]
        if is_sharded(value) or is_sharded(self.stand_in):
            copy_(self.stand_in, value)
        else:
            self.stand_in.copy_(value)  # without the modes that it enters each time
        if not is_sharded(self.stand_in):
            self.trained, self.tensors[self.leaf] = live, self.stand_in

    def take_back_(self) -> None:
        """Let the trained one be there again, moved or cast as the other was; harmless when repeated. In place."""
        if is_sharded(self.stand_in):
            copy_(self.stand_in, self.trained)
            self.trained = self.stand_in
            return
        now = self.tensors.get(self.leaf)
        if now is None or now is self.trained:
            return
        _follow_(self.trained, now)
        if self.trained.grad is not None:
            _follow_(self.trained.grad, now)
        self.tensors[self.leaf] = self.trained

    def had_backward(self) -> bool:
        """Return whether a gradient has reached a sharded parameter while its values were exchanged."""
        now = _gradient_key(self.stand_in)
        return is_sharded(self.stand_in) and now is not None and now != self.gradient


def _gradient_key(parameter: torch.Tensor) -> tuple[int, int] | None:
    return None if parameter.grad is None else (id(parameter.grad), local(parameter.grad)._version)


def _follow_(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Let a tensor have the dtype and the device of another. In place."""
    if (tensor.dtype, tensor.device) != (other.dtype, other.device):
        tensor.data = tensor.data.to(other.device, other.dtype)


def base_places(module: nn.Module) -> Mapping[str, BasePlace]:
    """Return the places of a module in which values from before training are, by name."""
    places: Mapping[str, BasePlace] = vars(module).get(PLACES, {})
    return places


def put_base_values_(
    state: Iterable[tuple[str, torch.Tensor | None, nn.Module]],
    initial: Callable[[nn.Module], Mapping[str, torch.Tensor]],
) -> None:
    """Let values from before training stand in for the trained ones, in what does not have them yet. In place.

    Args:
        state: of the injected module, see state_of.
        initial: returns what the record has of a module, by names in it. A value on the meta device was recorded before
            there were any: nothing was trained since.
    """
    with torch.inference_mode(False), torch.no_grad():
        _put_all_(list(state), initial)


def _put_all_(
    state: list[tuple[str, torch.Tensor | None, nn.Module]],
    initial: Callable[[nn.Module], Mapping[str, torch.Tensor]],
) -> None:
    recorded: dict[int, tuple[Mapping[str, torch.Tensor], str, str]] = {}  # by the identity of the live tensor
    for path, live, module in state:
        values, leaf = initial(module), path.rpartition(".")[2]
        if live is not None and leaf in values and not values[leaf].is_meta:
            recorded[id(live)] = values, leaf, path
    of_live: dict[int, BasePlace] = {}  # what is tied stays so
    for path, live, module in state:
        leaf = path.rpartition(".")[2]
        if live is None or id(live) not in recorded or leaf in base_places(module):
            continue
        tied = of_live.get(id(live))
        if tied is None or not is_sharded(live):
            tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            stand_in = live if is_sharded(live) else _like(live) if tied is None else tied.stand_in
            tied = of_live[id(live)] = BasePlace(tensors, leaf, *recorded[id(live)], live, stand_in)
        if HOOKS not in vars(module):
            _add_hooks(module)
        vars(module)[PLACES][leaf] = tied  # first, so that an exception finds what is to be taken back
        tied.put_()


def take_back_base_values_(modules: Collection[nn.Module]) -> list[str]:
    """Let every trained parameter and buffer of a model be there again; harmless when repeated. In place.

    Args:
        modules: all of the model's.

    Returns:
        The sharded parameters that a backward inside has reached: it ran on their values from before training.
    """
    reshard_(modules)
    reached = []
    for module in modules:
        for place in base_places(module).values():
            reached += [place.name] if place.had_backward() else []
            place.take_back_()
        for handle in vars(module).pop(HOOKS, ()):
            handle.remove()
        vars(module).pop(PLACES, None)
    return reached


def _like(live: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(live, requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(live, nn.Parameter) else empty


def _add_hooks(module: nn.Module) -> None:
    vars(module)[PLACES] = {}
    vars(module)[HOOKS] = [
        module.register_state_dict_post_hook(_show_trained),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_before_load),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_after_load),  # type: ignore[no-untyped-call]
    ]


def _show_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, place in base_places(module).items():
        shown = state_dict.get(prefix + name)
        if shown is not None:
            state_dict[prefix + name] = place.trained if shown is place.stand_in else place.trained.detach()


def _before_load(module: nn.Module, *args: Any) -> None:
    for place in base_places(module).values():
        place.take_back_()


def _after_load(module: nn.Module, *args: Any) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for place in base_places(module).values():
            place.put_()
