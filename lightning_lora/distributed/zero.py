"""DeepSpeed's float32 copies of trained parameters, and their optimizer's states: this rank's part of them is written.

DeepSpeed steps from these copies, and writes them over the parameters. So whoever writes parameters writes them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import pad

from .flat import flat_shard, is_flat
from .sharding import local


def keeps_copy(parameter: Any) -> bool:
    """Return whether DeepSpeed trains a copy of a parameter."""
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        return True
    optimizer = getattr(parameter, "_z3_optimizer", None)  # stage 3: also an attribute of frozen parameters
    return optimizer is not None and optimizer.get_param_id(parameter) in optimizer.grad_position


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
    if not hasattr(parameter, "ds_tensor"):
        getattr(utils, f"safe_set_full_{name}")(parameter, value.detach(), *keys)
        return
    shard, size = flat_shard(parameter), parameter.ds_tensor.numel()
    own = local(value) if is_flat(value) else value.detach().reshape(-1)[shard.start : shard.stop]
    getattr(utils, f"safe_set_local_{name}")(parameter, pad(own, (0, size - own.numel())), *keys)
