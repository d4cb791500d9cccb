"""The optimizer of DeepSpeed's engine: float32 copies of the trained parameters, and their states, divided over ranks.

They are read and written by DeepSpeed's public functions, one parameter at a time (deepspeed.utils.safe_get_full_...).
DeepSpeed's optimizer is recognised by its attributes. So DeepSpeed is imported only where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad

from ..errors import LoRAError
from ..private.deepspeed import (
    ZERO,
    flat_copies,
    flattened_groups,
    keeps_copy,
    link_states_,
    scale_of_loss,
    set_scale_of_loss_,
)
from .flat import flat_shard, is_flat
from .sharding import local

ORDER = "lora_order"  # attribute of DeepSpeed's optimizer: the groups as configure_optimizers built them
LOSS_SCALE = "loss_scale"  # entry of the optimizer's state dict, under fp16
Groups = Sequence[Mapping[str, Any]]  # of an optimizer: options, and "params"


def held_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the model's parameters that an optimizer trains; DeepSpeed's has flat tensors in its param_groups."""
    flat = flattened_groups(optimizer)
    return [p for group in ([g["params"] for g in optimizer.param_groups] if flat is None else flat) for p in group]


def holds_copies(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's, which trains copies of some parameters."""
    return flattened_groups(optimizer) is not None


def groups_of(optimizer: Any) -> Groups:
    """Return an optimizer's groups as configure_optimizers built them, frozen parameters too.

    An optimizer in DeepSpeed's config has one group, of all that was trainable.
    """
    if not holds_copies(optimizer):
        return cast(Groups, optimizer.param_groups)
    return vars(optimizer).get(ORDER) or [{**optimizer.param_groups[0], "params": held_parameters(optimizer)}]


def warn_of_unfrozen(optimizer: Any, unfrozen: Sequence[nn.Parameter]) -> None:
    """Warn where parameters were unfrozen after DeepSpeed chose what it trains."""
    held = {id(parameter) for parameter in held_parameters(optimizer)}
    lacking = [parameter for parameter in unfrozen if id(parameter) not in held]
    if holds_copies(optimizer) and lacking:
        warnings.warn(
            f"lightning_lora: DeepSpeed trains what was trainable when the fit began, and {len(lacking)} parameters "
            "were unfrozen since, so they stay as they are. Unfreeze them before the fit, or name their modules in "
            "modules_to_save.",
            stacklevel=2,
        )


# --- as on one device ---


def float32_copies(optimizer: Any) -> dict[int, torch.Tensor]:
    """Return DeepSpeed's copies of parameters in 16 bits, whole, on the CPU, by the parameter's id. Collective."""
    in_16_bits = []
    if holds_copies(optimizer):
        in_16_bits = [p for p in held_parameters(optimizer) if p.dtype in (torch.float16, torch.bfloat16)]
    if not in_16_bits:
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    return {id(parameter): safe_get_full_fp32_param(parameter).cpu() for parameter in in_16_bits}


def whole_state(optimizer: Any) -> dict[str, Any]:
    """Return the state dict that DeepSpeed's optimizer would have on one device. Collective."""
    states, kept = _whole_states(optimizer), iter(optimizer.param_groups)
    packed, state, first = list[dict[str, Any]](), dict[int, dict[str, Any]](), 0
    for group in groups_of(optimizer):
        parameters = group["params"]
        options = next(kept) if parameters else group  # DeepSpeed leaves out groups without parameters
        numbers = list(range(first, first + len(parameters)))
        first += len(numbers)
        packed.append({**options, "params": numbers})
        state |= {n: states[id(p)] for n, p in zip(numbers, parameters, strict=True) if id(p) in states}
    scale = scale_of_loss(optimizer)
    return {"state": state, "param_groups": packed, **({} if scale is None else {LOSS_SCALE: scale})}


def _whole_states(optimizer: Any) -> dict[int, dict[str, Any]]:
    """Return the state of each parameter, on the CPU, by the parameter's id. Collective.

    Raises:
        LoRAError: the optimizer has a state of another size than the parameters.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    link_states_(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for parameters, flat in flat_copies(optimizer):
        for key, value in optimizer.optimizer.state.get(flat, {}).items():
            if _is_divided(value) and value.shape != flat.shape:
                raise LoRAError(
                    f"LoRACallback: {type(optimizer.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} "
                    f"for {flat.numel()} values, which belongs to no parameter, so a checkpoint could not be resumed. "
                    "Use an optimizer that keeps a value for each value, such as AdamW."
                )
            for parameter in parameters:
                whole = safe_get_full_optimizer_state(parameter, key).cpu() if _is_divided(value) else _copy(value)
                found.setdefault(id(parameter), {})[key] = whole
    return found


def load_state_(optimizer: Any, saved: Mapping[str, Any], states: Mapping[int, Mapping[str, Any]]) -> None:
    """Load this rank's part of a state dict as one device has it into DeepSpeed's optimizer. In place.

    Args:
        optimizer: DeepSpeed's.
        saved: the state dict.
        states: those in it by the id of their parameter.
    """
    for group, options in zip(optimizer.param_groups, (g for g in saved["param_groups"] if g["params"]), strict=True):
        group.update({k: v for k, v in options.items() if k != "params"})
    for parameters, flat in flat_copies(optimizer):
        state = optimizer.optimizer.state[flat]
        for key, value in next((states[id(p)] for p in parameters if id(p) in states), {}).items():
            state[key] = torch.zeros_like(flat) if _is_divided(value) else _copy(value)
    link_states_(optimizer)
    for parameter in held_parameters(optimizer):
        for key, value in states.get(id(parameter), {}).items():
            if _is_divided(value):
                set_(parameter, value, key)
    set_scale_of_loss_(optimizer, saved.get(LOSS_SCALE, {}))


def _is_divided(value: Any) -> bool:
    """Return whether a state has values for each value of its parameter."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    """Return a state for one parameter. With one tensor for all of them AdamW would count each step several times."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


# --- one parameter ---


def update_copies_(written: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give DeepSpeed's copies of parameters the values that the parameters were given. In place.

    Args:
        written: parameters, and values, each whole or divided as its parameter is.
    """
    for parameter, value in written:
        if keeps_copy(parameter):
            set_(parameter, value)


def set_(parameter: Any, value: torch.Tensor, key: str | None = None) -> None:
    """Write this rank's part of a parameter's float32 copy, or of the optimizer's state of this name. In place.

    DeepSpeed's setters of whole tensors fail at stage 3 on the last rank, where a parameter's size is no multiple of
    the number of ranks.
    """
    from deepspeed import utils

    name, keys = ("fp32_param", ()) if key is None else ("optimizer_state", (key,))
    part = getattr(parameter, ZERO, None)
    if part is None:
        getattr(utils, f"safe_set_full_{name}")(parameter, value.detach(), *keys)
        return
    shard = flat_shard(parameter)
    own = local(value) if is_flat(value) else value.detach().reshape(-1)[shard.start : shard.stop]
    getattr(utils, f"safe_set_local_{name}")(parameter, pad(own, (0, part.numel() - own.numel())), *keys)
