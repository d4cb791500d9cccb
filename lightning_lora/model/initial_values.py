"""Record and restore the values from before training of trained base parameters and persistent buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_, copy_of, reshard_
from ..names import join_names, names_factor
from ..nn.adapted_module import AdaptedModule
from ..nn.foreign_weights import is_of_base
from .adapted_model import AdaptedModel
from .named_state import own_state


def snapshot_initial(handle: AdaptedModel) -> None:
    """Record the present values of trained base parameters and persistent buffers.

    After finish_injection only buffers without a recorded value are added: a parameter has been trained since.
    """
    record, is_validated = handle.record, "validated" in handle.record.marks
    reshard_(module for _, module in handle.root_modules)
    trained = handle.trained()
    initial = dict(record.initial) if is_validated else {}
    for name, module in handle.root_modules:
        for leaf, tensor in own_state(module).items():
            is_parameter = isinstance(tensor, nn.Parameter)
            if (isinstance(module, AdaptedModule) and names_factor(leaf)) or (is_parameter and is_validated):
                continue
            if not is_parameter and is_of_base(module):
                continue
            recorded = handle.recorded_name(join_names(name, leaf))
            if recorded not in initial and (not is_parameter or id(tensor) in trained):
                initial[recorded] = copy_of(tensor)
                trained.discard(id(tensor))  # once for tied modules
    record.initial = initial


def snapshot_materialised(handle: AdaptedModel) -> None:
    """Replace recorded values on the meta device by present values. Call it before training or loading."""
    reshard_(module for _, module in handle.root_modules)
    initial = handle.record.initial
    on_meta = [name for name, value in initial.items() if value.is_meta]
    initial.update({name: copy_of(tensor) for name, tensor in handle.recorded_tensors(on_meta)})


def record_loaded(handle: AdaptedModel, values: Mapping[str, object]) -> None:
    """Record the values of a base, which is loaded into a model, as those from before training.

    Args:
        handle: of the model.
        values: what is loaded, by the names in the model.
    """
    record = handle.record
    record.fingerprint = {}
    for name, value in ((handle.name_at_injection(name) or "", value) for name, value in values.items()):
        before = record.initial.get(name)
        if before is not None and isinstance(value, torch.Tensor) and unsharded_shape(before) == unsharded_shape(value):
            device = value.device if before.is_meta else before.device
            record.initial[name] = value.detach().clone().to(device, before.dtype)


def restore_initial_(handle: AdaptedModel) -> None:
    """Write the recorded values from before training into their tensors. In place."""
    reshard_(module for _, module in handle.root_modules)
    for tensor, value in handle.first_values():
        if not value.is_meta:  # it was recorded before the tensor had a value
            copy_(tensor, value)
