"""torch's private parts: FSDP1 (FullyShardedDataParallel), which has the same names in 2.6 to 2.13, and two attributes.

FSDP1 is not developed any more, so no issue asks for a public way; fully_shard (FSDP2) has one and needs nothing here.
Where one of FSDP1's names is missing, FSDP1Unit is an AttributeError or ImportError in setup, of which trainer/fsdp1.py
makes an error with the torch version and the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import LoRAError

# A module's attribute with the names of tensors that DDP does not send. Without it DDP itself refuses what it cannot
# send. torch has only the private method _set_params_and_buffers_to_ignore_for_model for it; no issue known.
LEFT_OUT_OF_DDP = "_ddp_params_and_buffers_to_ignore"
# Names of FSDP1's that a later moment of a fit needs; asked for in setup, so that a missing one is no crash at a step.
LATER = ("_training_state", "_prefetched", "needs_unshard", "reshard", "post_reshard", "process_group", "device")


def mark_as_parameter_(tensor: torch.Tensor) -> None:
    """Let isinstance(tensor, nn.Parameter) be true for the parameter of a TorchScript module. In place.

    torch.jit.load and copy.deepcopy give it as a plain tensor, which would be taken for a buffer. The attribute is the
    one by which torch itself recognises parameters of other tensor classes. Without it TorchScript's weights count as
    buffers, and a checkpoint of the adapter holds them. No issue known; TorchScript is not developed any more.
    """
    tensor._is_param = True


def averages_now(root: Any) -> bool:
    """Return whether FSDP1 averages gradients in this backward: not so inside of no_sync. Without the name always."""
    return bool(getattr(root, "_sync_gradients", True))


class FSDP1Unit:
    """A wrapper of FSDP1: its flat parameter, and the memory that it has gathered.

    FSDP1 keeps what it has gathered in the root, or under SHARD_GRAD_OP.

    Attributes:
        wrapper: a FullyShardedDataParallel.
        handle: of its flat parameter; None where the wrapper has no weights of its own.
        is_divided: each rank has a slice of the weights. Not so in a single process.
    """

    def __init__(self, wrapper: Any) -> None:
        """Let torch find the wrapper's place, if it has not yet. Call it for the outermost wrapper first.

        A wrapper that begins by itself would become a root.
        """
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        _lazy_init(wrapper, wrapper)
        self.wrapper = wrapper
        self.handle = wrapper._handle
        self.is_divided = self.handle is not None and self.handle.uses_sharded_strategy
        for name in LATER if self.handle is not None else ():
            getattr(self.handle, name)

    def inside(self) -> dict[nn.Module, dict[str, nn.Parameter]]:
        """Return the original parameters of the flat one, by the modules that own them and their names there."""
        inside: dict[nn.Module, dict[str, nn.Parameter]] = {}
        if self.handle is not None:
            flat = self.handle.flat_param
            places = (*flat._param_infos, *flat._shared_param_infos)
            for info, parameter in zip(places, (*flat._params, *flat._shared_params), strict=True):
                inside.setdefault(info.module, {})[info.param_name] = parameter
        return inside

    def slices(self) -> Iterator[tuple[nn.Parameter, Callable[[], tuple[Any, ...]]]]:
        """Yield each original parameter with a function that returns a FlatShard's fields: this rank's slice of it.

        FSDP1 replaces the memory of a slice, so it is found anew for each use.
        """
        if self.is_divided:
            flat = self.handle.flat_param
            for parameter, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
                yield parameter, partial(self._slice, info, shape)

    def _slice(self, info: Any, shape: torch.Size) -> tuple[Any, ...]:
        own = self.handle.flat_param._local_shard.detach()
        start = info.intra_param_start_idx if info.in_shard else 0
        values = own.narrow(0, info.offset_in_shard, info.numel_in_shard) if info.in_shard else own[:0]
        return values, start, shape, self.handle.process_group, self.handle.device

    def is_trained(self) -> bool:
        """Return whether a weight of the flat parameter requires a gradient."""
        return bool(self.handle.flat_param.requires_grad)

    def free(self) -> None:
        """Drop what was gathered, unless a forward or backward runs in this wrapper, and put the parameters back."""
        if self.handle is None or not self._is_idle():
            return
        if not self.is_divided or not self.handle.needs_unshard():
            self.handle.reshard(self.is_divided)  # without slices there is nothing to free
            self.handle.post_reshard()
            self.handle._prefetched = False

    def begin_writing(self, verb: str) -> None:
        """Let a backward of an earlier forward raise, as on one device, because slices are written now.

        Args:
            verb: the public function that the user called, for the message.

        Raises:
            LoRAError: a forward or backward runs, or an exception has ended one. It uses what it has gathered.
        """
        if self.handle is None:
            return
        if not self._is_idle():
            raise LoRAError(
                f"{verb}: the weights of {type(self.wrapper.module).__name__} cannot be changed while FSDP1 computes "
                "with them. Call it between steps, not inside a forward or backward; an evaluation with "
                "merged_eval=False changes none. After an exception in a forward build the model again."
            )
        torch.autograd.graph.increment_version(self.handle.flat_param)

    def end_backward(self) -> None:
        """Note that a backward has ended. torch does so only where it began at the outermost wrapper's outputs."""
        if self.handle._training_state.name.startswith("BACKWARD"):
            self.wrapper.training_state = type(self.wrapper.training_state).IDLE
            self.handle._training_state = type(self.handle._training_state).IDLE
            self.free()

    def _is_idle(self) -> bool:
        return all(each.name == "IDLE" for each in (self.wrapper.training_state, self.handle._training_state))
