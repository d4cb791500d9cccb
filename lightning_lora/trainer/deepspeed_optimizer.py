"""The optimizer of DeepSpeed's engine: float32 copies of the trained parameters, and their states, divided over ranks.

They are read and written by DeepSpeed's public functions, one parameter at a time (deepspeed.utils.safe_get_full_...).
DeepSpeed's optimizer is recognised by its attributes. So DeepSpeed is imported only where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..distributed.zero import set_
from ..errors import LoRAError
from ..nn.low_rank import HALF

ORDER = "lora_order"  # attribute of DeepSpeed's optimizer: the groups as configure_optimizers built them
LOSS_SCALE = "loss_scale"  # entry of the optimizer's state dict, under fp16
SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what DeepSpeed's scaler changes
Groups = Sequence[Mapping[str, Any]]  # of an optimizer: options, and "params"


def held_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the model's parameters that an optimizer trains; DeepSpeed's has flat tensors in its param_groups."""
    flat = _flattened(optimizer)
    return [p for group in ([g["params"] for g in optimizer.param_groups] if flat is None else flat) for p in group]


def _flattened(optimizer: Any) -> Sequence[Sequence[nn.Parameter]] | None:
    """Return the parameters of each flat tensor of DeepSpeed's optimizer; None for another optimizer."""
    groups: Any = getattr(optimizer, "bit16_groups", getattr(optimizer, "fp16_groups", None))
    return cast("Sequence[Sequence[nn.Parameter]] | None", groups)


def holds_copies(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's, which trains copies of some parameters."""
    return _flattened(optimizer) is not None


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
    in_16_bits = [p for p in held_parameters(optimizer) if p.dtype in HALF] if holds_copies(optimizer) else []
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
    scaler = optimizer.loss_scaler
    scale = {LOSS_SCALE: {n: getattr(scaler, n) for n in SCALES if hasattr(scaler, n)}} if scaler.dynamic else {}
    return {"state": state, "param_groups": packed, **scale}


def _whole_states(optimizer: Any) -> dict[int, dict[str, Any]]:
    """Return the state of each parameter, on the CPU, by the parameter's id. Collective.

    Raises:
        LoRAError: the optimizer has a state of another size than the parameters.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_states_(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for parameters, flat in _flat_copies(optimizer):
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
    for parameters, flat in _flat_copies(optimizer):
        state = optimizer.optimizer.state[flat]
        for key, value in next((states[id(p)] for p in parameters if id(p) in states), {}).items():
            state[key] = torch.zeros_like(flat) if _is_divided(value) else _copy(value)
    _link_states_(optimizer)
    for parameter in held_parameters(optimizer):
        for key, value in states.get(id(parameter), {}).items():
            if _is_divided(value):
                set_(parameter, value, key)
    if optimizer.loss_scaler.dynamic:
        vars(optimizer.loss_scaler).update(saved.get(LOSS_SCALE, {}))


def _flat_copies(optimizer: Any) -> Iterator[tuple[Sequence[nn.Parameter], torch.Tensor]]:
    """Yield parameters with this rank's part of their copies, one after the other: a key of the inner optimizer."""
    stage_3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    flat = optimizer.single_partition_of_fp32_groups if stage_3 is None else stage_3
    yield from zip(_flattened(optimizer) or (), flat, strict=True)


def _link_states_(optimizer: Any) -> None:
    """Let the public functions find the states in stages 1 and 2. In place.

    DeepSpeed does so once, after the first group's first step, when the states of other groups are not there yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer._hp_optimizer_states_linked = False  # so that the next step looks at the states anew


def _is_divided(value: Any) -> bool:
    """Return whether a state has values for each value of its parameter."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    """Return a state for one parameter. With one tensor for all of them AdamW would count each step several times."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
