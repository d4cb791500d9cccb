"""Record and restore the values from before training of trained base parameters and persistent buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_, copy_of, reshard_
from ..names import names_factor
from ..nn.adapted_module import AdaptedModule
from ..nn.foreign_linear import is_of_base
from .adapted_model import AdaptedModel
from .facts import Fact
from .named_state import own_state


def snapshot_initial(handle: AdaptedModel) -> None:
    """Record the present values of trained base parameters and persistent buffers.

    After finish_injection only buffers without a recorded value are added: a parameter has been trained since.
    """
    is_validated = "validated" in handle.injection.marks
    reshard_(module for _, module in handle.root_modules)
    known = handle.known
    met: set[int] = set()  # a tied tensor lies in several modules
    for _, module in handle.root_modules:
        for leaf, tensor in own_state(module).items():
            is_parameter = isinstance(tensor, nn.Parameter)
            if (isinstance(module, AdaptedModule) and names_factor(leaf)) or (is_parameter and is_validated):
                continue
            if not is_parameter and is_of_base(module):
                continue
            if is_parameter and (id(tensor) not in known or known[id(tensor)].fact.trained is None):
                continue
            fact = handle.fact(module, leaf, tensor)
            if id(tensor) not in met and (fact.initial is None or not is_validated):
                fact.initial = copy_of(tensor)
            met.add(id(tensor))


def snapshot_materialised(handle: AdaptedModel) -> None:
    """Replace recorded values on the meta device by present values. Call it before training or loading."""
    reshard_(module for _, module in handle.root_modules)
    for tensor, fact in handle.known.values():
        if fact.initial is not None and fact.initial.is_meta:
            fact.initial = copy_of(tensor)


def record_loaded(handle: AdaptedModel, values: Mapping[str, object]) -> None:
    """Record the values of a base, which is loaded into a model, as those from before training.

    Args:
        handle: of the model.
        values: what is loaded, by the names in the model.
    """
    handle.set_fingerprint({})
    known = handle.known
    for name, tensor, _ in handle.state():
        value = values.get(name)
        before = known[id(tensor)].fact.initial if id(tensor) in known else None
        if before is not None and isinstance(value, torch.Tensor) and unsharded_shape(before) == unsharded_shape(value):
            device = value.device if before.is_meta else before.device
            known[id(tensor)].fact.initial = value.detach().clone().to(device, before.dtype)


class Recorded(NamedTuple):
    """What was known of a model's tensors at one time: a copy of each fact by the tensor's id, and trained_count."""

    facts: dict[int, Fact]
    trained_count: int


def facts_before(handle: AdaptedModel) -> Recorded:
    """Return what is recorded now, for take_back_facts_."""
    return Recorded({key: replace(fact) for key, (_, fact) in handle.known.items()}, handle.injection.trained_count)


def take_back_facts_(handle: AdaptedModel, before: Recorded) -> None:
    """Take back what was recorded since facts_before. In place; harmless when repeated.

    The model holds the same tensors. Its injection may be another one.
    """
    for key, (_, fact) in handle.known.items():
        earlier = before.facts.get(key, Fact())
        fact.requires_grad = earlier.requires_grad
        fact.trained = earlier.trained
        fact.initial = earlier.initial
        fact.entry = earlier.entry
    handle.injection.trained_count = before.trained_count


def restore_initial_(handle: AdaptedModel) -> None:
    """Write the recorded values from before training into their tensors. In place."""
    reshard_(module for _, module in handle.root_modules)
    for tensor, value in handle.initial_values():
        if not value.is_meta:  # it was recorded before the tensor had a value
            copy_(tensor, value)
