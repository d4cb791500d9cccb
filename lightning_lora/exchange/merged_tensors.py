"""Merged tensors of a live model, whole and one at a time: for engines that take weights over the wire, and for files.

Between two of them the caller's code runs, and may train. So what training changes is watched: all tensors are those of
one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NoReturn

import torch
from torch import nn

from ..distributed.rank_sync import RankSync
from ..distributed.sharding import PLAIN_TYPES, detached, full_tensor, local, reshard_
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, open_model
from ..model.dequantize import dequantize_dtype, dequantized_weight, quantized_weights
from ..model.foreign_state import foreign_entries
from ..model.gradients import warn_of_untrained
from ..model.injection import Injection
from ..model.live_state import LiveState, open_state
from ..model.recorded_layers import refuse_replaced_layers
from ..model.state_dict import refuse_unmergeable
from ..nn.adapted_module import adapter_of, is_factor
from ..nn.claims import claimed
from ..nn.low_rank import HALF
from ..nn.quantized import quantization_entries
from ..nn.rounding import IN_FILES, Rounding

VERB = "merged_tensors"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def merged_tensors(
    model: nn.Module, *, dequantize: torch.dtype | str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator of (name, tensor) over the plain model's state dict, with merged weights, in its order.

    The values are those of merged_state_dict. One whole tensor is made at a time, in memory of its own (but for weights
    that stay quantized), on the device of its weight. The live weights stay as they are, merged or not. Entries of the
    state dict that are no tensors are left out.

    Collective where the model is sharded: every rank takes all of them, in step.

    Args:
        model: injected, or with attached adapters.
        dequantize: the dtype of plain weights in place of quantized weights, adapted or not.

    Raises:
        LoRAError: as merged_state_dict; and in the loop, where the adapter has changed since the first tensor, as by an
            optimizer's step or load_adapter. The tensors so far then belong to an adapter that is gone.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> for name, tensor in merged_tensors(model):
        ...     print(name, tuple(tensor.shape))
        0.weight (8, 8)
        0.bias (8,)
        2.weight (2, 8)
        2.bias (2,)
    """
    handle, dtype = open_model(model, VERB, attached=True), dequantize_dtype(dequantize, VERB)
    with claimed(VERB, handle.injection.claims):
        refuse_replaced_layers(handle, VERB)
        warn_of_untrained(handle)
        refuse_unmergeable(handle, dtype)
    return _tensors(handle, dtype)


def _tensors(handle: AdaptedModel, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the merged tensors of a model. It belongs to nobody between two of them."""
    with claimed(VERB, handle.injection.claims):
        live = open_state(handle)
        trained = Trained(handle, live)
        others = _other_entries(handle, live, dtype)
    quantized = quantized_weights(handle.places)
    modules = [module for _, module in handle.modules]
    sync = RankSync(tensor for _, tensor, _ in live.entries if tensor is not None)
    rounding = Rounding(sync)

    def take(name: str, tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
        with claimed(VERB, handle.injection.claims):
            reshard_(modules)
            sync.run(VERB, partial(trained.refuse_written, *trained.parts_of(name, module)))
            whole = merged_tensor(VERB, name, tensor, module, rounding, dtype if name in quantized else None)
            sync.raise_on_any_rank()
            # In memory of its own, but for a quantized one, whose class may have no exact copy.
            shares = type(whole) in PLAIN_TYPES and whole.data_ptr() == local(tensor).data_ptr()
            return whole.clone() if shares else whole

    for name, tensor, module in live.entries:
        if tensor is not None and not is_factor(name, module):
            yield name, take(name, tensor, module)
    yield from others.items()
    sync.run(VERB, trained.refuse_changed)
    sync.raise_on_any_rank()
    rounding.tell("merged 16-bit weights", IN_FILES, stacklevel=3)


def merged_tensor(
    verb: str, name: str, tensor: torch.Tensor, module: nn.Module, rounding: Rounding, dtype: torch.dtype | None
) -> torch.Tensor:
    """Return a whole tensor with the adapter merged. It may share memory with the live one. Collective where sharded.

    Args:
        verb: the public function, for the names of steps.
        name: in the model's state dict.
        tensor: the live tensor; a merged weight is taken as it is.
        module: its owner.
        rounding: counts what rounding costs. Its `sync` keeps the error of a weight that cannot be merged.
        dtype: for a quantized weight, of the plain weight in its place; else None.
    """
    if dtype is not None:
        return full_tensor(dequantized_weight(name, module, dtype, rounding))
    values = [detached(tensor)]
    adapter = adapter_of(module, name.rpartition(".")[2])
    if adapter is not None and adapter.lora.undo is None:
        weight = adapter.adapted_weight()
        blocks = adapter.blocks(weight)
        cost = rounding.of(adapter, tensor) if tensor.dtype in HALF else None

        def merge() -> None:
            values[0] = adapter.merged_weight(weight, blocks, cost)

        rounding.sync.run(f"{verb}: {name!r}", merge)
    return full_tensor(values.pop())


def _other_entries(handle: AdaptedModel, live: LiveState, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return copies of the tensors that modules write into a state dict of their own, as bitsandbytes writes scales."""
    written = dict(foreign_entries(handle).values)
    quantized = {} if dtype is not None else quantized_weights(handle.places)
    for name, module in quantized.items():
        state = module.state_dict(prefix=name.removesuffix(name.rpartition(".")[2]))
        written |= {entry: state[entry] for entry in state if entry in quantization_entries(state, [name])}
    tensors = {name: value for name, value in written.items() if isinstance(value, torch.Tensor)}
    return {name: value.detach().clone() for name, value in tensors.items() if name not in live.tensors}


class Trained:
    """What changes merged weights, and how it was when the first tensor was taken: parameters and strengths.

    torch counts writes to a tensor. At each tensor the counts of what goes into it are compared, and all of them at the
    end: comparing all at each tensor took seconds with many experts. Fused optimizers and writes through `.data` are
    not counted, so at the end the sums of the bits are compared too.
    """

    def __init__(self, handle: AdaptedModel, live: LiveState) -> None:
        self.injection, self.strengths = handle.injection, _strengths(handle.injection)
        tensors = ((name, live.tensors[name]) for name in live.changing)
        self.parameters = {name: tensor for name, tensor in tensors if isinstance(tensor, nn.Parameter)}
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.parts = {name: local(parameter) for name, parameter in self.parameters.items()}
        self.writes = {name: _writes(part) for name, part in self.parts.items()}
        self.sums = {name: _sum_of_bits(part) for name, part in self.parts.items()}

    def parts_of(self, name: str, module: nn.Module) -> list[str]:
        """Return the names of the parameters that go into a merged tensor of this name in this module."""
        layer = adapter_of(module, name.rpartition(".")[2])
        factors = [] if layer is None else [self.names.get(id(factor), name) for factor in layer.trained_tensors()]
        return [each for each in (name, *factors) if each in self.parts]

    def refuse_written(self, *names: str) -> None:
        """Raise LoRAError where an adapter was taken out, or one of these parameters or a strength is another."""
        if "ended" in self.injection.marks:
            _refuse("the adapter was taken out")
        if _strengths(self.injection) != self.strengths:
            _refuse("what is attached, or a strength, has changed")
        for name in names:
            if _writes(self.parts[name]) != self.writes[name]:
                _refuse(f"{name!r} has changed")

    def refuse_changed(self) -> None:
        """Raise LoRAError as refuse_written does for all parameters, and where the bits of one are others."""
        self.refuse_written(*self.parts)
        for name, parameter in self.parameters.items():
            if _sum_of_bits(local(parameter)) != self.sums[name]:
                _refuse(f"{name!r} has changed")


def _strengths(injection: Injection) -> tuple[object, ...]:
    """Return what is attached with its strength, and the strengths that open blocks have set."""
    return dict(injection.attached), dict(injection.strength_log.now)


def _refuse(what: str) -> NoReturn:
    raise LoRAError(
        f"{what} since the first tensor, so that those so far belong to an adapter that is gone. Take all of them "
        "before you train, load or unload, and now begin again."
    )


def _writes(part: torch.Tensor) -> int:
    return 0 if part.is_inference() else part._version


@torch.no_grad()
def _sum_of_bits(part: torch.Tensor) -> int:
    real = torch.view_as_real(part) if part.is_complex() else part
    return int(real.contiguous().view(INTEGERS[real.itemsize]).sum(dtype=torch.int64))
