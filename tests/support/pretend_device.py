"""A device that is not the CPU, pretended on it.

Tensors say that they are on the device "pretend", keep their values in the CPU's memory, and run every operator there.
They refuse what a GPU refuses: an operator over two devices. So a tensor made on the wrong device, or a wrong branch for
devices that are not the CPU, is seen without a GPU. Neither speed nor kernels are pretended, and torch.compile does not
know such tensors.

    with pretend_device():
        model.to(DEVICE)
        model(batch.to(DEVICE)).sum().backward()
        model.weight.grad.cpu()

torch takes one such device a process, for good. Outside `pretend_device` it is there, but not available.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "pretend"
CAN_PRETEND = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # not in old versions of torch

Observer = Callable[[torch._ops.OpOverload, Any, Any], None]
OBSERVERS: list[Observer] = []  # each is called with an operator, what it was given and what it returned

MAY_MIX = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::index_put_", "aten::index_put", "aten::index"}
LOWER = (  # what autocast runs in the lower precision on a GPU
    *("linear", "matmul", "mm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "bmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"),
)
FLOAT32 = (  # and in float32
    *("softmax", "log_softmax", "layer_norm", "native_layer_norm", "group_norm", "norm", "exp", "log", "pow", "cumsum"),
    *("nll_loss", "nll_loss_nd", "mse_loss", "l1_loss", "cross_entropy_loss", "binary_cross_entropy_with_logits"),
)

_state = {"registered": False, "active": False}
_libraries: list[torch.library.Library] = []  # an override lasts as long as its library


class Pretend(torch.Tensor):
    """A tensor that says it is on the device; `raw` holds its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(DEVICE, 0),
        )
        made.raw = raw
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.raw})"

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw  # type: ignore[attr-defined]

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol at the moment."
            )
        with torch.no_grad():
            made: Any = self.clone()
        made.requires_grad_(self.requires_grad)
        own = {name: value for name, value in vars(self).items() if name != "raw"}
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(own, memo))
        made.grad = None if self.grad is None else copy.deepcopy(self.grad, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the values, as torch does for devices without storages."""
        made = (self.raw, self.dtype, DEVICE, self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, and say that what it makes is on the device."""
    name = func.name().split(".")[0]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
    if name == "aten::_has_compatible_shallow_copy_type":
        return not others
    if pretended and others and name not in MAY_MIX:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu, {shapes}")
    device = kwargs.get("device")
    there = bool(pretended) if device is None else torch.device(device).type == DEVICE
    on_cpu = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
    raw_args, raw_kwargs = pytree.tree_map_only(Pretend, lambda tensor: tensor.raw, (args, on_cpu))
    found = func(*raw_args, **raw_kwargs)
    if name == "aten::copy_":
        made = args[0]
    else:
        known = {id(tensor.raw): tensor for tensor in pretended}

        def back(raw: torch.Tensor) -> torch.Tensor:
            if id(raw) in known:
                return known[id(raw)]
            return Pretend(raw) if there else raw

        made = pytree.tree_map_only(torch.Tensor, back, found)
    for observe in OBSERVERS:
        observe(func, (args, kwargs), made)
    return made


class _Mode(TorchDispatchMode):
    """What is given no tensor of the device yet makes one, as torch.eye(3, device="pretend") does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == DEVICE
        if there or any(isinstance(leaf, Pretend) for leaf in pytree.tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Module:
    """What torch.pretend has to offer: autocast, random numbers and torch.accelerator ask it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return _state["active"]

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return int(_state["active"])

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's stream is seeded already."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        """Everything has run already."""


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    return Pretend(
        torch.empty(size, dtype=dtype, memory_format=options.get("memory_format") or torch.contiguous_format)
    )


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, **_: Any) -> torch.Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    values = (tensor.raw if isinstance(tensor, Pretend) else tensor for tensor in (self, source))
    next(values).copy_(next(values))
    return self


def _override_autocast(name: str, lower: bool) -> None:
    """Register an operator's cast: no device but the CPU and those of torch's own has one."""
    operators = getattr(torch.ops.aten, name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def register(operator: torch._ops.OpOverload) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(DEVICE) if lower else torch.float32

            def cast(tensor: torch.Tensor) -> torch.Tensor:
                casts = tensor.is_floating_point() and tensor.device.type == DEVICE and tensor.dtype != torch.float64
                return tensor.to(dtype) if casts else tensor

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*pytree.tree_map_only(torch.Tensor, cast, args), **kwargs)

        _libraries[0].impl(operator, run, "AutocastPrivateUse1")

    for overload in operators.overloads():
        if "out" not in overload and "dimname" not in overload:
            register(getattr(operators, overload))


def _register() -> None:
    """Tell torch of the device, once."""
    if _state["registered"]:
        return
    # A backward before the device is known: else autograd starts a thread for it, and no fork of this process could
    # run a backward any more.
    torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    _libraries.extend((library, others))
    # What C++ calls past the modes, as torch.tensor(..., device="pretend") does.
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("copy_", _copy_, "PrivateUse1")
    for name in LOWER:
        _override_autocast(name, lower=True)
    for name in FLOAT32:
        _override_autocast(name, lower=False)
    _state["registered"] = True


@contextmanager
def pretend_device() -> Iterator[str]:
    """Make the device available, and give its name."""
    _register()
    before = _state["active"]
    _state["active"] = True
    try:
        # Backward runs in this thread: autograd has none for this device.
        with torch.autograd.set_multithreading_enabled(False), _Mode():
            yield DEVICE
    finally:
        _state["active"] = before
