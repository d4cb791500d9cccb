"""load_state_dict on an injected model: a complete base or a complete adapter loads strictly, a part of one does not.

A hook on each adapted layer and on what contains it fills in what such a state dict leaves out by design with the live
values, so that torch's own strict check stays in force for everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import LoRALayer, canonical
from .injection import ATTRIBUTE, is_factor, named_state
from .state import adapter_keys


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


def _fill_in(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *args: Any,
) -> None:
    state = {name: (tensor, owner) for name, tensor, owner in named_state(module, raw=True)}
    for name in state:  # names saved without the segments of wrappers
        plain = prefix + canonical(name)
        if plain in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(plain)
    given = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    factors = {name for name, (_, owner) in state.items() if is_factor(name, owner)}
    base = state.keys() - factors
    adapter = set(adapter_keys(module)) if ATTRIBUTE in vars(module) else set()
    trained = {name for name in state if canonical(name) in adapter} or None
    if given >= base and not given & factors:
        if trained is not None:
            _take_as_initial(module, state_dict, prefix)
        absent = factors
    elif trained is not None and given >= trained and not given & (base - trained):
        absent = base - trained
    else:  # the hooks further down would take each layer by itself
        absent = set()
        if strict and given & factors:
            missing_keys += [prefix + name for name in sorted(factors - given) if not _half_given(name, given)]
    for name in absent:
        state_dict[prefix + name] = state[name][0]


def _half_given(factor: str, given: set[str]) -> bool:
    """The layer itself reports a factor whose partner is there, or whose weight is missing too."""
    path = factor.rpartition(".")[0]
    path = f"{path}." if path else ""
    return path + "weight" not in given or bool({path + "lora_A", path + "lora_B"} & given)


def _take_as_initial(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """A new base: what training will change starts from its values."""
    injection = vars(module)[ATTRIBUTE]
    initial, injection.fingerprint = injection.initial, {}
    given = {canonical(key[len(prefix) :]): value for key, value in state_dict.items() if key.startswith(prefix)}
    for name, value in initial.items():
        new = given[name]
        if isinstance(new, torch.Tensor) and new.shape == value.shape:
            initial[name] = new.detach().to(new.device if value.is_meta else value.device, value.dtype, copy=True)
