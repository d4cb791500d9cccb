"""A stand-in for one parameter W with the value W + left @ right. It avoids building that sum.

transformers' experts hold W as a stack (E, m, n) and use it in their own forward: they index it, transpose it and
multiply with it. The stand-in does each of these with W and with the two factors. Any other operator gets the sum,
which is computed once. PyTorch calls `__torch_function__` before it runs an operator, so no forward has to change.

The stand-in is a real tensor, and autograd knows how its gradient reaches the factors. This is needed because
autograd.Function.apply does not call `__torch_function__`, and crashes on an object that is no real tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from ..errors import LoRAError
from .autocast import without_autocast

ALIGNMENT = 16  # bytes; grouped_mm needs storages and rows that begin at multiples of this

Rule = Callable[..., Any]  # (operator, args, kwargs) -> the result, or NotImplemented if the operator needs the sum


class FactoredWeight(torch.Tensor):
    """A weight with the value weight + left @ right, over the last two dimensions.

    Its shape, strides, dtype and device are the weight's. Gradients reach all three parts. It cannot be written to.

    Args:
        weight: (E, m, n) or (m, n).
        left: (E, m, r) or (m, r), in any floating dtype; it is cast when it is used.
        right: (E, r, n) or (r, n), likewise. One of the two factors includes the adapter's scaling.
    """

    weight: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> FactoredWeight:
        stand_in: FactoredWeight = _StandIn.apply(weight, left, right)  # type: ignore[no-untyped-call]
        return stand_in

    def __init__(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        self.weight, self.left, self.right, self.dense = weight, left, right, None
        self.pairs: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def pair(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left and right of one expert. All are taken apart at once, so that backward joins them once.

        The gradient of an index is a stack for each expert.
        """
        recorded = torch.is_grad_enabled()
        if recorded not in self.pairs:
            self.pairs[recorded] = list(zip(self.left.unbind(), self.right.unbind(), strict=True))
        return self.pairs[recorded][expert]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        rule = RULES.get(func)
        if rule is None and _name(func) == "grouped_mm_fallback":  # transformers' own; this imports nothing of it
            rule = _grouped_mm
        result = rule(func, args, kwargs) if rule else NotImplemented
        if result is not NotImplemented:
            return result
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(FactoredWeight, dense_weight, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator that came here without __torch_function__ on the sum.

        Gradients are recorded above this level, by _StandIn.
        """
        _refuse_writes(func, args, kwargs or {})
        with torch.no_grad():
            args, kwargs = tree_map_only(FactoredWeight, dense_weight, (args, kwargs or {}))
        return func(*args, **kwargs)


class _StandIn(torch.autograd.Function):
    """Make the stand-in, a tensor without storage. In backward, pass the sum's gradient to its three parts."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)  # not in setup_context, which takes three times as long
        made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            FactoredWeight, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device
        )
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        of_weight, of_left, of_right = ctx.needs_input_grad
        return (
            grad if of_weight else None,
            grad.to(left.dtype) @ right.mT.to(left.dtype) if of_left else None,
            left.mT.to(right.dtype) @ grad.to(right.dtype) if of_right else None,
        )


def dense_weight(stand_in: FactoredWeight) -> torch.Tensor:
    """Return weight + left @ right, rounded once to the weight's dtype. The stand-in keeps it for later calls."""
    weight, left, right = stand_in.weight, stand_in.left, stand_in.right
    wants_graph = torch.is_grad_enabled() and any(part.requires_grad for part in (weight, left, right))
    if stand_in.dense is None or (wants_graph and not stand_in.dense.requires_grad):
        wide = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), right.dtype)
        with without_autocast(weight.device.type):
            stand_in.dense = (weight.to(wide) + left.to(wide) @ right.to(wide)).to(weight.dtype)
    return stand_in.dense


# --- operators that stay factored ---


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(weight, FactoredWeight) or weight.weight.dim() != 2:
        return NotImplemented
    left, right = _cast_factors(weight, x)
    return func(x, weight.weight, bias) + func(func(x, right), left)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = args
    if {1, 3} <= {a.dim(), b.dim()}:  # a vector times the first factor gives (E, r), which would count as one matrix
        return NotImplemented
    if isinstance(b, FactoredWeight):
        left, right = _cast_factors(b, a)
        return func(a, b.weight) + func(func(a, left), right)
    left, right = _cast_factors(a, b)
    return func(a.weight, b) + func(left, func(right, b))


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiply each expert's rows of x with the expert's matrix."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    if len(args) not in (2, 3) or not options.keys() <= {"offs"}:
        return NotImplemented
    x, weight, *offs = args
    if not isinstance(weight, FactoredWeight) or weight.weight.dim() != 3:
        return NotImplemented
    left, right = _cast_factors(weight, x)
    left, right = _align(left), _align(right.mT).mT  # zeros may add to the rank
    base = func(x, weight.weight, *offs, **options)
    delta = func(func(x, left, *offs, **options), right, *offs, **options)
    if delta.requires_grad:  # its gradient may have any layout; grouped_mm's backward needs aligned rows
        delta.register_hook(_align_gradient)
    return base.add_(delta)


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    """Select one expert, a slice of the experts, or experts by a tensor of their numbers."""
    stand_in, index = args
    if not isinstance(stand_in, FactoredWeight) or stand_in.weight.dim() != 3:
        return NotImplemented
    if isinstance(index, torch.Tensor):
        if index.dim() > 1 or index.dtype not in (torch.int32, torch.int64):
            return NotImplemented
        index = index if index.dim() else index.item()  # one wait for the device instead of three
    elif isinstance(index, bool) or not isinstance(index, (int, slice)):
        return NotImplemented
    factors = stand_in.pair(index) if isinstance(index, int) else (stand_in.left[index], stand_in.right[index])
    return FactoredWeight(stand_in.weight[index], *factors)


def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    """Swap the last two dimensions, whichever operator does it."""
    stand_in, *dims = args
    if not isinstance(stand_in, FactoredWeight):
        return NotImplemented
    weight, swapped = func(stand_in.weight, *dims, **kwargs), stand_in.weight.mT
    if (weight.shape, weight.stride()) != (swapped.shape, swapped.stride()):
        return NotImplemented
    return FactoredWeight(weight, stand_in.right.mT, stand_in.left.mT)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """View a matrix with the rows of all experts as a stack, as DBRX does."""
    stand_in, *shape = args
    if not isinstance(stand_in, FactoredWeight) or stand_in.weight.dim() != 2:
        return NotImplemented
    weight = func(stand_in.weight, *shape, **kwargs)
    if weight.dim() != 3 or weight.shape[-1] != stand_in.weight.shape[-1]:
        return NotImplemented
    left = stand_in.left.reshape(*weight.shape[:-1], stand_in.left.shape[-1])
    return FactoredWeight(weight, left, stand_in.right.expand(len(weight), -1, -1))


def _convert(func: Any, args: Any, kwargs: Any) -> Any:
    """Change dtype, device or layout of the weight. The factors move to its device, and keep their dtype until used."""
    stand_in, *options = args
    if not isinstance(stand_in, FactoredWeight):
        return NotImplemented
    weight = func(stand_in.weight, *options, **kwargs)
    if weight is stand_in.weight:
        return stand_in
    if not weight.is_floating_point():
        return NotImplemented
    return FactoredWeight(weight, stand_in.left.to(weight.device), stand_in.right.to(weight.device))


def _data_ptr(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the address of the weight on the CPU, and of the sum on other devices.

    On the CPU transformers only checks the alignment of the address. Elsewhere a kernel may read from it.
    """
    (stand_in,) = args
    return (stand_in.weight if stand_in.weight.is_cpu else dense_weight(stand_in)).data_ptr()


def _cast_factors(stand_in: FactoredWeight, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return stand_in.left.to(x.dtype), stand_in.right.to(x.dtype)


def _align(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous, at an aligned address, with each row padded by zeros to an aligned length."""
    missing = -x.shape[-1] % (ALIGNMENT // x.element_size())
    x = (F.pad(x, (0, missing)) if missing else x).contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _align_gradient(grad: torch.Tensor | None) -> torch.Tensor | None:
    return None if grad is None else _align(grad)[..., : grad.shape[-1]]


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    name = _name(func)
    in_place = name in WRITES or (name.endswith("_") and not name.endswith("__"))
    for written in (args[0] if in_place else None, kwargs.get("out")):
        if isinstance(written, FactoredWeight):
            raise LoRAError(
                f"{name}: a forward writes into an adapted weight of shape {tuple(written.weight.shape)} while its "
                "adapter is active; write outside of the forward, or leave this weight unadapted."
            )


def _name(func: Any) -> str:
    return getattr(func, "__name__", "").partition(".")[0]  # without the name of an overload


Tensor = torch.Tensor
PROPERTIES = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized"
)
METHODS = "size dim numel nelement stride is_contiguous element_size is_floating_point is_complex get_device __len__"
FACTS = {  # these ask for no values, and the stand-in answers them as the sum would
    *(getattr(Tensor, name).__get__ for name in PROPERTIES.split()),
    *(getattr(Tensor, name) for name in METHODS.split()),
    torch.is_floating_point,
}
WRITES = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"}
TRANSPOSES = "transpose swapaxes swapdims permute t"
CONVERSIONS = "to float double half bfloat16 cpu cuda contiguous"
RULES: dict[Any, Rule] = {
    F.linear: _linear,
    **dict.fromkeys((Tensor.__matmul__, Tensor.matmul, Tensor.mm, Tensor.bmm), _matmul),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matmul),
    Tensor.__getitem__: _index,
    **{getattr(kind, name): _transpose for kind in (torch, Tensor) for name in TRANSPOSES.split()},
    **dict.fromkeys((Tensor.T.__get__, Tensor.mT.__get__), _transpose),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.view, Tensor.reshape), _view),
    **{getattr(Tensor, name): _convert for name in CONVERSIONS.split()},
    Tensor.data_ptr: _data_ptr,
}
if hasattr(torch, "_grouped_mm"):  # F.grouped_mm calls it
    RULES[torch._grouped_mm] = _grouped_mm
