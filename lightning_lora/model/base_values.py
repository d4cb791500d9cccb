"""Put values from before training in place of trained values, while disable_adapter lasts.

Other tensors with these values stand in for the trained parameters and buffers in their modules. So nothing is written
into tensors that a forward has saved for its backward, and parameters keep their identity, gradients and optimizers.
State dicts show the trained tensors meanwhile, and load_state_dict writes into the trained tensors. Sharded parameters
are the exception: FSDP2 would gather the trained parameters again, so their values are exchanged in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed.flat import flat_parameters
from ..distributed.sharding import copy_, copy_of, is_spread, local, reshard_
from ..errors import LoRAError

PLACES = "lora_base_places"  # attribute of a module with stand-ins: its BasePlaces by name
HOOKS = "lora_base_hooks"  # attribute of such a module: the handles of the hooks below


@dataclass
class BasePlace:
    """One parameter or buffer of a module, in whose place its value from before training is.

    Attributes:
        tensors: the module's dictionary of parameters or buffers.
        leaf: the tensor's name in `tensors`.
        initial: recorded values of the first module that has the tensor.
        key: the tensor's name in `initial`.
        name: the tensor's name in the injected module, for messages.
        trained: the trained tensor; for a sharded parameter a copy of its values.
        stand_in: the tensor that the module sees; for a sharded parameter the parameter itself.
        gradient: identity and version of a sharded parameter's gradient when its values were exchanged.
    """

    tensors: dict[str, Any]
    leaf: str
    initial: Mapping[str, torch.Tensor]
    key: str
    name: str
    trained: torch.Tensor
    stand_in: torch.Tensor
    gradient: tuple[int, int] | None = None

    def put_(self) -> None:
        """Put the value from before training in place. In place."""
        live = self.tensors[self.leaf]
        if is_spread(self.stand_in):
            if self.trained is not self.stand_in:
                return  # its tied twin was put already
            self.gradient, self.trained = _gradient_key(self.stand_in), copy_of(self.stand_in)
        else:
            _follow_(self.stand_in, live)
        value = self.initial[self.key]
        if is_spread(value) or is_spread(self.stand_in):
            copy_(self.stand_in, value)
        else:
            self.stand_in.copy_(value)  # sharding.copy_ would enter inference_mode and no_grad again, which takes time
        if not is_spread(self.stand_in):
            self.trained, self.tensors[self.leaf] = live, self.stand_in

    def take_back_(self) -> None:
        """Put the trained tensor back, moved or cast as the stand-in is now. In place; harmless when repeated."""
        if is_spread(self.stand_in):
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
        """Return whether a sharded parameter got a gradient while its values were exchanged."""
        now = _gradient_key(self.stand_in)
        return is_spread(self.stand_in) and now is not None and now != self.gradient


def _gradient_key(parameter: torch.Tensor) -> tuple[int, int] | None:
    """Return identity and version of a parameter's gradient, or None without a gradient."""
    return None if parameter.grad is None else (id(parameter.grad), local(parameter.grad)._version)


def _follow_(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Give a tensor the dtype and the device of another. In place."""
    if (tensor.dtype, tensor.device) != (other.dtype, other.device):
        tensor.data = tensor.data.to(other.device, other.dtype)


def base_places(module: nn.Module) -> Mapping[str, BasePlace]:
    """Return the module's tensors that have stand-ins now, by name."""
    places: Mapping[str, BasePlace] = vars(module).get(PLACES, {})
    return places


def put_base_values_(
    state: Iterable[tuple[str, torch.Tensor | None, nn.Module]],
    initial: Callable[[nn.Module], Mapping[str, torch.Tensor]],
) -> None:
    """Put values from before training in place of trained tensors, unless they are there already. In place.

    Args:
        state: of the injected module, see state_of.
        initial: returns the recorded values of a module's own tensors by name. Values on the meta device are passed
            over: they were recorded before the tensors had values, and nothing was trained since.
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
            if leaf in flat_parameters(module):
                raise LoRAError(
                    f"disable_adapter: {path!r} was unfrozen after FSDP1 had wrapped the model, which then gathers its "
                    "trained values in each forward. Name its module in modules_to_save, so that it is trained outside "
                    "of FSDP1's flat weights."
                )
            recorded[id(live)] = values, leaf, path
    of_live: dict[int, BasePlace] = {}  # tied tensors share one stand-in
    for path, live, module in state:
        leaf = path.rpartition(".")[2]
        if live is None or id(live) not in recorded or leaf in base_places(module):
            continue
        tied = of_live.get(id(live))
        if tied is None or not is_spread(live):
            tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            stand_in = live if is_spread(live) else _like(live) if tied is None else tied.stand_in
            tied = of_live[id(live)] = BasePlace(tensors, leaf, *recorded[id(live)], live, stand_in)
        if HOOKS not in vars(module):
            _add_hooks(module)
        vars(module)[PLACES][leaf] = tied  # before put_, so that an exception in it can be undone
        tied.put_()


def take_back_base_values_(modules: Collection[nn.Module]) -> list[str]:
    """Put every trained parameter and buffer of a model back. In place; harmless when repeated.

    Args:
        modules: all modules of the model.

    Returns:
        The names of sharded parameters that got a gradient meanwhile, which was computed with the wrong values.
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
    """Return an empty tensor, or frozen parameter, of the same shape, dtype and device."""
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
