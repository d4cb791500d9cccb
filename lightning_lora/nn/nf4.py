"""Linear layers with torchao's NF4Tensor: 4-bit values, one scale for 64 of them, and the scales in 8 bits.

The weight consists of plain tensors, and each of its rows can be dequantized without the others. So fully_shard (FSDP2)
shards it by rows. torchao is imported only where a layer is quantized.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import from_local_like, is_sharded, local
from ..errors import LoRAError
from .quantized import NF4, is_nf4_tensor

PLACES = ("torchao.quantization", "torchao.dtypes", "torchao.dtypes.nf4tensor")  # in order of torchao's versions
BLOCK = 64  # values that share a scale
LARGEST_GROUP = 256  # scales that are quantized together
SMALLEST_GROUP = 4  # unless the number of scales is not divisible by it
RANKS = 64  # that a weight can be sharded over, if it is large enough


class NF4Linear(nn.Linear):
    """nn.Linear whose weight is an NF4Tensor.

    A cast of the layer leaves the weight quantized, because torchao casts it to the input's dtype in each forward. A
    copy or a pickle has the weight's bits. torchao itself dequantizes a weight that is cast, and quantizes a copied one
    again, with other values.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        weight = self._parameters["weight"]
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        self._parameters["weight"] = _moved(weight, fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # object has none in Python 3.10
        state = dict(inherited() if inherited is not None else vars(self))
        weight = self._parameters["weight"]
        if is_nf4_tensor(weight) and not is_sharded(weight):
            state["_parameters"] = {**self._parameters, "weight": Parts.of(weight)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        parts: Any = self._parameters["weight"]
        if isinstance(parts, Parts):
            self._parameters["weight"] = _parameter(parts.tensor())


@dataclass(frozen=True)
class Parts:
    """The plain tensors that an NF4Tensor consists of, and what torchao needs to put them together."""

    cls: type[Any]
    tensors: dict[str, torch.Tensor]
    context: dict[str, Any]

    @classmethod
    def of(cls, weight: Any) -> Parts:
        """Take an NF4Tensor apart. The parts share its memory."""
        names, context = weight.__tensor_flatten__()
        return cls(type(weight), {name: getattr(weight, name) for name in names}, context)

    def tensor(self) -> torch.Tensor:
        """Put the parts together, on the device where they are."""
        meta = replace(self.context["tensor_meta"], device=self.tensors["quantized_data"].device, requires_grad=False)
        context = {**self.context, "tensor_meta": meta}
        unflatten: Callable[..., torch.Tensor] = self.cls.__tensor_unflatten__
        return unflatten(self.tensors, context, meta.original_shape, meta.original_strides)


def quantize_linear_(layer: nn.Linear, name: str) -> None:
    """Turn an nn.Linear into an NF4Linear with a quantized copy of its weight. In place.

    Args:
        layer: an nn.Linear that can_be_nf4.
        name: for messages.

    Raises:
        LoRAError: torchao is missing, or a value of the weight is not finite.
    """
    weight, tensor_class = layer.weight, nf4_tensor_class()
    with torch.inference_mode(False), torch.no_grad():
        values = weight.detach().contiguous()
        quantized = tensor_class.from_tensor(values, BLOCK, group_size(values.numel() // BLOCK))
        if not bool(torch.isfinite(quantized.scaler_mean)):
            raise LoRAError(
                f"quantize_base: a value of {name!r} is not finite, so its weight cannot be quantized. Load the base's "
                f"weights again, or leave the layer out with exclude_modules=[{name!r}]."
            )
        layer.weight = _parameter(quantized)
    layer.__class__ = NF4Linear


def can_be_nf4(weight: torch.Tensor) -> bool:
    """Return whether a weight consists of whole blocks of 64 values in a dtype that torchao quantizes."""
    return weight.is_floating_point() and weight.itemsize in (2, 4) and weight.numel() % BLOCK == 0


def group_size(scales: int) -> int:
    """Return how many scales are quantized together: as many as leave a group for each of 64 ranks."""
    size = LARGEST_GROUP
    while scales % size or (scales // size < RANKS and size > SMALLEST_GROUP):
        size //= 2
    return size


def nf4_tensor_class() -> Any:
    """Return torchao's class NF4Tensor.

    Raises:
        LoRAError: torchao is not installed, or has no such class.
    """
    for place in PLACES:
        try:
            found = getattr(importlib.import_module(place), NF4, None)
        except ImportError:
            continue
        if found is not None:
            return found
    raise LoRAError(
        f"quantize_base: expected torchao's {NF4}, found it in none of {', '.join(PLACES)}. Install it with "
        "`pip install torchao`."
    )


def _moved(weight: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a weight whose parts fn has moved, in their old dtypes; the weight itself where fn moves nothing."""
    if not is_nf4_tensor(weight):
        return weight if weight is None else _parameter(fn(weight))
    parts = Parts.of(local(weight) if is_sharded(weight) else weight)
    moved = {name: fn(tensor) for name, tensor in parts.tensors.items()}
    for name, tensor in parts.tensors.items():
        if moved[name].dtype != tensor.dtype:  # a cast: scales keep their dtype, as the values depend on it
            moved[name] = tensor.to(moved[name].device)
    if all(moved[name] is tensor for name, tensor in parts.tensors.items()):
        return weight
    return _parameter(from_local_like(replace(parts, tensors=moved).tensor(), weight))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
