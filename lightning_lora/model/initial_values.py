"""Record and restore the values from before training of trained base parameters and persistent buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_, copy_of, reshard_
from ..names import names_factor
from ..nn.adapted_module import AdaptedModule
from .adapted_model import AdaptedModel
from .injection import Injection
from .named_state import own_state


def snapshot_initial(handle: AdaptedModel) -> None:
    """Record the present values of trained base parameters and persistent buffers.

    After finish_injection only buffers without a recorded value are added: a parameter has been trained since.
    """
    record = handle.record
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        if not record.validated:
            record.forget_initial(module)
        earlier, marks = record.initial(module), record.marks(module)
        new = {leaf: tensor for leaf, tensor in _changed_by_training(module, marks).items() if leaf not in earlier}
        if record.validated:
            new = {leaf: tensor for leaf, tensor in new.items() if not isinstance(tensor, nn.Parameter)}
        record.keep_initial(module, {leaf: copy_of(tensor) for leaf, tensor in new.items()})


def _changed_by_training(module: nn.Module, marks: Mapping[str, Set[str]]) -> dict[str, torch.Tensor]:
    """Return a module's own trained base parameters and persistent buffers."""
    return {
        leaf: tensor
        for leaf, tensor in own_state(module).items()
        if "trained" in marks.get(leaf, ()) or not isinstance(tensor, nn.Parameter)
        if not (isinstance(module, AdaptedModule) and names_factor(leaf))
    }


def snapshot_materialised(handle: AdaptedModel) -> None:
    """Replace recorded values on the meta device by present values. Call it before training or loading."""
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        on_meta = [leaf for leaf, value in handle.record.initial(module).items() if value.is_meta]
        now = own_state(module) if on_meta else {}
        handle.record.keep_initial(module, {leaf: copy_of(now[leaf]) for leaf in on_meta})


def record_loaded(record: Injection, values: Iterable[tuple[nn.Module, str, object]]) -> None:
    """Record the values of a loaded base as those from before training.

    Args:
        record: of the injected model that the base is loaded into.
        values: what is loaded: the module, the tensor's name in the module, and its new value.
    """
    record.fingerprint = {}
    for module, leaf, value in values:
        before = record.initial(module).get(leaf)
        if before is not None and isinstance(value, torch.Tensor) and unsharded_shape(before) == unsharded_shape(value):
            device = value.device if before.is_meta else before.device
            record.keep_initial(module, {leaf: value.detach().clone().to(device, before.dtype)})


def restore_initial_(handle: AdaptedModel) -> None:
    """Write the recorded values from before training into their tensors. In place."""
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        values, own = handle.record.initial(module), own_state(module)
        for leaf, value in values.items():
            if leaf in own and not value.is_meta:  # a value on meta was recorded before the tensor had one
                copy_(own[leaf], value)
