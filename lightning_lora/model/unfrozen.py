"""Keep the first values of base parameters that are unfrozen after injection, before an optimizer changes them.

disable_adapter and unload bring these values back. LoRACallback records them too, in a hook of the Trainer that comes
after the step's closure. But a loop without a Trainer has no such hook, and neither has an optimizer that a
LightningModule steps without Lightning's wrapper (use_pl_optimizer=False).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .adapted_model import Listing, find_in
from .injection import Injection

_watched = WeakValueDictionary[int, Injection]()  # the records of injected models, by id
_known: set[int] = set()  # the ids of trainable parameters of optimizers that have stepped
_hooks: list[Any] = []  # of torch, for all optimizers; none before the first injection


def keep_first_values(record: Injection) -> None:
    """Record, from now on, what is unfrozen in an injected model and held by an optimizer that is about to step."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    _watched[id(record)] = record
    _known.clear()  # this injection has frozen parameters that were no model's base before


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Look into the injected models where the optimizer trains a parameter that is not known yet."""
    if torch.compiler.is_compiling():  # the graph of a compiled step would break here
        return
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    new = {id(parameter) for parameter in held if id(parameter) not in _known and parameter.requires_grad}
    if not new:
        return
    for record in list(_watched.values()):
        root = record.holder()
        handle = find_in(Listing(root)) if root is not None else None
        if handle is not None:
            handle.record_before_step(new)
    _known.update(new)
