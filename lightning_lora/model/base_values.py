"""Values from before training stand in for trained ones while disable_adapter lasts.

Other tensors are put in the places of trained parameters and buffers in their modules. So nothing is written into
tensors that a forward has saved for its backward, and parameters keep their identity, gradients and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..distributed.flat import flat_parameters
from ..distributed.sharding import copy_all_, is_spread
from ..errors import LoRAError
from ..nn.owner import REFUSED_INSIDE


def _refuse(verb: str, *args: Any, **options: Any) -> NoReturn:
    raise LoRAError(f"{verb}: {REFUSED_INSIDE}")


REFUSING = {  # methods by which torch saves, loads, copies and pickles one module, and so every module around it
    "_save_to_state_dict": partial(_refuse, "state_dict"),
    "_load_from_state_dict": partial(_refuse, "load_state_dict"),
    "__reduce_ex__": partial(_refuse, "copy and pickle"),
}


class StandIn(NamedTuple):
    """A tensor with the value from before training of one parameter or buffer of a module."""

    tensors: dict[str, Any]  # the module's dictionary of parameters or buffers
    leaf: str  # the tensor's name in it
    trained: torch.Tensor
    value: torch.Tensor

    def take_out_(self) -> None:
        """Put the trained tensor back, moved or cast as the stand-in was. In place; harmless when repeated."""
        now = self.tensors.get(self.leaf, self.trained)
        for tensor in (self.trained, self.trained.grad):
            if tensor is not None and (tensor.dtype, tensor.device) != (now.dtype, now.device):
                tensor.data = tensor.data.to(now.device, now.dtype)
        self.tensors[self.leaf] = self.trained


def stand_ins(
    state: Iterable[tuple[str, torch.Tensor | None, nn.Module]],
    initial: Callable[[nn.Module], Mapping[str, torch.Tensor]],
) -> list[StandIn]:
    """Return stand-ins for all trained tensors of a model. Tied tensors share one. The model is not changed.

    Args:
        state: of the injected module, see state_of.
        initial: returns the recorded values of a module's own tensors by name. Values on the meta device are passed
            over: they were recorded before the tensors had values, and nothing was trained since.

    Raises:
        LoRAError: a trained tensor is sharded. A strategy gathers its trained values in each forward.
    """
    entries = [(path, live, module) for path, live, module in state if live is not None]
    recorded: dict[int, torch.Tensor] = {}  # by the identity of the live tensor
    for path, live, module in entries:
        value = initial(module).get(path.rpartition(".")[2])
        if value is not None and not value.is_meta:
            _refuse_sharded(path, live, module)
            recorded[id(live)] = value
    values: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False):
        for _, live, _ in entries:
            if id(live) in recorded and id(live) not in values:
                empty = torch.empty_like(live, requires_grad=False)
                values[id(live)] = nn.Parameter(empty, False) if isinstance(live, nn.Parameter) else empty
    copy_all_((values[key], recorded[key]) for key in values)
    found = []
    for path, live, module in entries:
        if id(live) in values:
            leaf = path.rpartition(".")[2]
            tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            found.append(StandIn(tensors, leaf, live, values[id(live)]))
    return found


def _refuse_sharded(path: str, live: torch.Tensor, module: nn.Module) -> None:
    if is_spread(live) or path.rpartition(".")[2] in flat_parameters(module):
        raise LoRAError(
            f"disable_adapter: {path!r} is trained and sharded, so a forward gathers its trained values. Name its "
            "module in modules_to_save where FSDPStrategy shards the model, leave it out of fully_shard where you do, "
            "or take the reference from a second model."
        )


def put_in_(found: Sequence[StandIn], modules: Iterable[nn.Module]) -> None:
    """Let stand-ins take the places of trained tensors, and let torch neither save, load nor copy modules. In place."""
    for module in modules:
        for name, refusal in REFUSING.items():
            vars(module).setdefault(name, refusal)
    for each in found:
        each.tensors[each.leaf] = each.value


def take_out_(found: Sequence[StandIn], modules: Iterable[nn.Module]) -> None:
    """Do the reverse of put_in_, or of a part of it. In place; harmless when repeated."""
    for each in found:
        each.take_out_()
    for module in modules:
        for name, refusal in REFUSING.items():
            if vars(module).get(name) is refusal:
                del vars(module)[name]
