"""Values from before training, of all that it changes beside the adapters: recorded, kept up to date, brought back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..distributed.sharding import copy_, reshard_
from ..names import names_factor
from ..nn.lora_layer import AdaptedModule
from .adapted_model import AdaptedModel
from .injection import Injection
from .named_state import own_state


def snapshot_initial(handle: AdaptedModel) -> None:
    """Record the present values of what training changes; once the injection was validated, only what is new."""
    record = handle.record
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        kept = record.kept(module)
        if kept is not None and not record.validated:
            kept["initial"].clear()
        marks, earlier = (kept["marks"], kept["initial"]) if kept is not None else ({}, {})
        for leaf, tensor in own_state(module).items():
            is_changed = "trained" in marks.get(leaf, ()) if isinstance(tensor, nn.Parameter) else True
            if is_changed and leaf not in earlier and not (isinstance(module, AdaptedModule) and names_factor(leaf)):
                record.keep(module)["initial"][leaf] = tensor.detach().clone()


def snapshot_materialised(handle: AdaptedModel) -> None:
    """Record present values in place of those from the meta device; call before training or loading."""
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        kept = handle.record.kept(module)
        for leaf, value in list(kept["initial"].items()) if kept is not None else ():
            if value.is_meta:
                kept["initial"][leaf] = own_state(module)[leaf].detach().clone()  # type: ignore[index]


def record_loaded(record: Injection, values: Iterable[tuple[nn.Module, str, object]]) -> None:
    """Record values of a new base as those from before training.

    Args:
        record: of an injected model, or of one that this base is for a part of.
        values: what is loaded: the module, the tensor's name in it, and its new value.
    """
    record.fingerprint = {}
    for module, leaf, value in values:
        kept = record.kept(module)
        before = kept["initial"].get(leaf) if kept is not None else None
        if kept is None or before is None or not isinstance(value, torch.Tensor) or before.shape != value.shape:
            continue
        device = value.device if before.is_meta else before.device
        kept["initial"][leaf] = value.detach().clone().to(device, before.dtype)


def restore_initial_(handle: AdaptedModel) -> None:
    """Write the values from before training into what has them. In place."""
    reshard_(module for _, module in handle.root_modules)
    for _, module in handle.root_modules:
        values, own = handle.record.initial(module), own_state(module)
        for leaf, value in values.items():
            if leaf in own and not value.is_meta:  # a value on meta was recorded before there were any
                copy_(own[leaf], value)
