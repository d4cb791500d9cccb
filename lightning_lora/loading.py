"""load_state_dict on an injected model: a complete base or a complete adapter loads strictly, a part of one does not.

A hook on each adapted layer and on what contains it fills in what such a state dict leaves out by design with the live
values, so that torch's own strict check stays in force for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .base import LoRALayer
from .injection import ATTRIBUTE, is_factor, named_state, note_loaded
from .state import adapter_keys
from .wrappers import CHECKPOINTED, canonical

# What state dicts of an injected model may carry beside tensors: by key, what takes it up when it is loaded.
EXTRA_ENTRIES: dict[str, Callable[[nn.Module, Any], None]] = {}


def accept_partial_states(root: nn.Module) -> None:
    """Install the hook where it is missing."""
    for module in root.modules():
        inside = any(isinstance(child, LoRALayer) for child in module.modules())
        if inside and not _hooks(module):
            module.register_load_state_dict_pre_hook(_fill_in)  # type: ignore[no-untyped-call]


def accept_whole_states_only(root: nn.Module) -> None:
    """Take the hook out again."""
    for module in root.modules():
        for key in _hooks(module):
            del module._load_state_dict_pre_hooks[key]


def _hooks(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _fill_in]


def _fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """The injected model judges, or the part of it on which load_state_dict is called; parts further down do not."""
    if ATTRIBUTE not in vars(module) and canonical(prefix.rstrip(".")):
        return
    for key in EXTRA_ENTRIES.keys() & {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}:
        if ATTRIBUTE in vars(module):
            EXTRA_ENTRIES[key](module, state_dict.pop(prefix + key))
    state = {_as_seen_here(name): (tensor, owner) for name, tensor, owner in named_state(module, raw=True)}
    for name in state:  # names saved without the segments of wrappers
        plain = prefix + canonical(name)
        if plain in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(plain)
    given = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    factors = {name for name, (_, owner) in state.items() if is_factor(name, owner)}
    base = state.keys() - factors
    changing = _changing(module, state)
    absent = set()
    if given >= base and not given & factors:
        note_loaded(module, {canonical(name): state_dict[prefix + name] for name in base & changing})
        absent = factors
    elif given >= changing and not given & (base - changing):
        absent = base - changing
    for name in absent:
        state_dict[prefix + name] = state[name][0]


def _as_seen_here(name: str) -> str:
    """checkpoint_wrapper leaves its segment out of state dicts, and puts it in just before the hooks on itself run."""
    first, dot, rest = name.partition(".")
    segment = f"{CHECKPOINTED}."
    return first + dot + rest.replace(segment, "") if first == CHECKPOINTED else name.replace(segment, "")


def _changing(module: nn.Module, state: Mapping[str, tuple[torch.Tensor | None, nn.Module]]) -> set[str]:
    """The names of what training can change; a part of an injected model goes by what is trainable now."""
    if ATTRIBUTE in vars(module):
        adapter = set(adapter_keys(module))
        return {name for name in state if canonical(name) in adapter}
    return {name for name, (tensor, _) in state.items() if not isinstance(tensor, nn.Parameter) or tensor.requires_grad}
