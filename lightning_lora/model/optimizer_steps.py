"""Note which parameters torch's optimizers have stepped on, until it is known whether training reaches the adapters.

An optimizer that was built before inject holds the base's parameters and no adapter. One that has not stepped yet has
trained nothing, which is no fault.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from torch.optim.optimizer import register_optimizer_step_post_hook

from .injection import Injection

_awaited = WeakValueDictionary[int, Injection]()  # the records that are noted for, by id
_hooks: list[Any] = []  # of torch, for all optimizers; none before the first injection


def note_steps(record: Injection) -> None:
    """Note in the record of an injection, from now on, the parameters of each optimizer that steps."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_note))
    _awaited[id(record)] = record


def stop_noting(record: Injection) -> None:
    """Note no more steps for the record of an injection."""
    _awaited.pop(id(record), None)


def _note(optimizer: Any, args: Any, kwargs: Any) -> None:
    for record in list(_awaited.values()):
        _note_for(record, optimizer)


def _note_for(record: Injection, optimizer: Any) -> None:
    """Note an optimizer's parameters, if that was not done since its last group was added.

    A step whose learning rate is zero trains nothing. torch makes one where it loads an optimizer's sharded state.
    """
    groups = [group["params"] for group in optimizer.param_groups if group["params"]]
    if not groups or id(groups[-1][-1]) in record.steps.on_gradients:
        return
    if all(group.get("lr") == 0 for group in optimizer.param_groups):
        return
    parameters = [parameter for group in groups for parameter in group]
    record.steps.all.update(map(id, parameters))
    if any(parameter.grad is not None for parameter in parameters):
        record.steps.on_gradients.update(map(id, parameters))
