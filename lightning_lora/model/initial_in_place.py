"""Put initial values in the places of trained tensors while disable_adapter or scaled(model, 0) lasts.

Other tensors are put in the places of trained parameters and buffers in their modules. So nothing is written into
tensors that a forward has saved for its backward, and parameters keep their identity, gradients and optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..distributed.flat import flat_parameters
from ..distributed.sharding import copy_all_, is_spread
from ..errors import LoRAError
from ..nn.claims import REFUSED_INSIDE
from .adapted_model import AdaptedModel
from .named_state import state_of


def _refuse(verb: str, *args: Any, **options: Any) -> NoReturn:
    raise LoRAError(f"{verb}: {REFUSED_INSIDE}")


REFUSING = {  # methods by which torch saves, loads, copies and pickles one module, and so every module around it
    "_save_to_state_dict": partial(_refuse, "state_dict"),
    "_load_from_state_dict": partial(_refuse, "load_state_dict"),
    "__reduce_ex__": partial(_refuse, "copy and pickle"),
}


class InitialValue(NamedTuple):
    """A tensor with the initial value of one trained parameter or buffer of a module."""

    module: nn.Module
    tensors: dict[str, Any]  # the module's dictionary of parameters or buffers
    leaf: str  # the tensor's name in it
    trained: torch.Tensor
    value: torch.Tensor

    def take_out_(self) -> None:
        """Put the trained tensor back, moved or cast as this one was. In place; harmless when repeated."""
        now = self.tensors.get(self.leaf, self.trained)
        for tensor in (self.trained, self.trained.grad):
            if tensor is not None and (tensor.dtype, tensor.device) != (now.dtype, now.device):
                tensor.data = tensor.data.to(now.device, now.dtype)
        self.tensors[self.leaf] = self.trained


def initial_values_of(handle: AdaptedModel) -> list[InitialValue]:
    """Return a tensor with the initial value of each trained one. Tied tensors share one. The model is not changed.

    Values on the meta device are left out: they were recorded before the tensors had values, and nothing was trained
    since.

    Raises:
        LoRAError: a trained tensor is sharded. A strategy gathers its trained values in each forward.
    """
    recorded = [(live, value) for live, value in handle.initial_values() if not value.is_meta]
    with torch.inference_mode(False):
        values = {id(live): _like(live) for live, _ in recorded}
    found = []
    for path, live, module in state_of(handle.outer_places) if values else ():
        if live is not None and id(live) in values:
            _refuse_sharded(path, live, module)
            leaf = path.rpartition(".")[2]
            tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            found.append(InitialValue(module, tensors, leaf, live, values[id(live)]))
    copy_all_((values[id(live)], value) for live, value in recorded)
    return found


def _like(live: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor, or frozen parameter, of the same shape, dtype and device."""
    empty = torch.empty_like(live, requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(live, nn.Parameter) else empty


def _refuse_sharded(path: str, live: torch.Tensor, module: nn.Module) -> None:
    if is_spread(live) or path.rpartition(".")[2] in flat_parameters(module):
        raise LoRAError(
            f"disable_adapter: {path!r} is trained and sharded, so a forward gathers its trained values. Name its "
            "module in modules_to_save where FSDPStrategy shards the model, leave it out of fully_shard where you do, "
            "or take the reference from a second model."
        )


def put_in_(found: Sequence[InitialValue], modules: Iterable[nn.Module]) -> None:
    """Put initial values in place of trained tensors, and let torch neither save, load nor copy modules. In place."""
    for module in modules:
        for name, refusal in REFUSING.items():
            vars(module).setdefault(name, refusal)
    for each in found:
        each.tensors[each.leaf] = each.value


def take_out_(found: Sequence[InitialValue], modules: Iterable[nn.Module]) -> None:
    """Do the reverse of put_in_, or of a part of it. In place; harmless when repeated."""
    for each in found:
        each.take_out_()
    for module in modules:
        for name, refusal in REFUSING.items():
            if vars(module).get(name) is refusal:
                del vars(module)[name]
