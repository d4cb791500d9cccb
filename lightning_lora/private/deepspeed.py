"""DeepSpeed's private parts: its optimizer, ZeRO-3's slices and zero.Init. The same names in 0.16.9 to 0.19.

DeepSpeed trains float32 copies of the trained parameters, and writes them over the parameters after each step. So
whoever writes parameters writes the copies too. Its public functions read and write one whole parameter at a time
(deepspeed.utils.safe_get_full_...); which parameters have copies, what its groups were and which slice is on this rank
no public function tells. No issue about it is known.

Parameters and optimizers are recognised by their attributes, so that DeepSpeed is imported only where it is used.
Where the names are missing, a fit is an error at its start, see `what_is_unknown`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

ZERO = "ds_tensor"  # attribute of a parameter of zero.Init, which has this rank's slice
SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what the scaler of the loss changes


# --- parameters ---


def keeps_copy(parameter: Any) -> bool:
    """Return whether DeepSpeed trains a copy of a parameter."""
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        return True
    optimizer = getattr(parameter, "_z3_optimizer", None)  # stage 3: also an attribute of frozen parameters
    return optimizer is not None and optimizer.get_param_id(parameter) in optimizer.grad_position


def slice_of_zero(parameter: Any) -> tuple[Any, ...]:
    """Return a FlatShard's fields: this rank's slice of a parameter of ZeRO-3.

    The last slice of a parameter is filled up to the size of the others; those values are left out.
    """
    part, group = getattr(parameter, ZERO), parameter.ds_process_group
    start = min(part.ds_numel * dist.get_rank(group), parameter.ds_numel)
    count = min(part.ds_numel, parameter.ds_numel - start)
    return part.detach()[:count], start, parameter.ds_shape, group, parameter.device


# --- what an engine has gathered at stage 3 ---


def gathering_part(optimizer: Any) -> Any:
    """Return the part of an engine's optimizer that gathers parameters and frees them, or None before stage 3."""
    offload = getattr(optimizer, "parameter_offload", optimizer)
    return offload if hasattr(offload, "partition_all_parameters") else None


class GatheredByZero:
    """What an engine has gathered at stage 3."""

    def __init__(self, offload: Any, parameters: Iterable[Any]) -> None:
        """Note the engine's part that gathers parameters and frees them, and the parameters that are divided."""
        self.offload: Callable[[], Any] = weakref.ref(offload)
        self.parameters = [each for each in parameters if getattr(each, ZERO, None) is not None]

    def free(self) -> None:
        """Let the slices be the only copies of parameters that were gathered, or that are being gathered. In place.

        DeepSpeed gathers small parameters once for many forwards, and others ahead of time. An exception inside a
        forward leaves some gathered, and noted as in use.
        """
        if all(each.ds_status.name == "NOT_AVAILABLE" for each in self.parameters):
            return
        offload = self.offload()
        if offload is not None:
            offload.partition_all_parameters()
        for parameter in self.parameters:
            if parameter.ds_status.name == "AVAILABLE":
                parameter.ds_active_sub_modules.clear()
                parameter.partition()

    def begin_writing(self, verb: str) -> None:
        """Do nothing: a forward that runs gathers anew what was freed."""


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Leave deepspeed.zero.Init inside the block: there every new tensor is cast, moved and divided."""
    partition = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partition is None:
        yield
        return
    partition.shutdown_init_context()
    try:
        yield
    finally:
        partition.restore_init_context()


# --- the optimizer ---


def flattened_groups(optimizer: Any) -> Sequence[Sequence[nn.Parameter]] | None:
    """Return the parameters of each flat tensor of DeepSpeed's optimizer; None for another optimizer."""
    groups: Any = getattr(optimizer, "bit16_groups", getattr(optimizer, "fp16_groups", None))
    return cast("Sequence[Sequence[nn.Parameter]] | None", groups)


def flat_copies(optimizer: Any) -> Iterator[tuple[Sequence[nn.Parameter], torch.Tensor]]:
    """Yield parameters with this rank's part of their copies, one after the other: a key of the inner optimizer."""
    stage_3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    flat = optimizer.single_partition_of_fp32_groups if stage_3 is None else stage_3
    yield from zip(flattened_groups(optimizer) or (), flat, strict=True)


def link_states_(optimizer: Any) -> None:
    """Let the public functions find the states in stages 1 and 2. In place.

    DeepSpeed does so once, after the first group's first step, when the states of other groups are not there yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer._hp_optimizer_states_linked = False  # so that the next step looks at the states anew


def scale_of_loss(optimizer: Any) -> dict[str, Any] | None:
    """Return the state of the scaler of the loss under fp16; None where the scale is fixed."""
    scaler = optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in SCALES if hasattr(scaler, name)} if scaler.dynamic else None


def set_scale_of_loss_(optimizer: Any, scale: Mapping[str, Any]) -> None:
    """Give the scaler of the loss a state of scale_of_loss, where its scale is not fixed. In place."""
    if optimizer.loss_scaler.dynamic:
        vars(optimizer.loss_scaler).update(scale)


def what_is_unknown(optimizer: Any) -> str:
    """Return "" where DeepSpeed's optimizer is built as this file knows it; otherwise what is lacking.

    Without this look a checkpoint would lack states, or a step would write over an adapter that was loaded.
    """
    groups = flattened_groups(optimizer)
    if groups is None:
        return f"a {type(optimizer).__name__}"
    if not hasattr(optimizer, "loss_scaler") or not hasattr(optimizer, "optimizer"):
        return f"a {type(optimizer).__name__} without loss_scaler or optimizer"
    in_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if not in_stage_3 and not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return f"a {type(optimizer).__name__} without float32 copies"
    if not all(keeps_copy(parameter) for group in groups for parameter in group):
        return "parameters without float32 copies"
    return ""
