"""A device that is not the CPU, pretended on it.

Tensors say that they are on the device "pretend", keep their values in the CPU's memory, and run every operator there.
They refuse what a GPU refuses: an operator over two devices, a generator of another device, a view as numpy. So a
tensor made on the wrong device is seen without a GPU, and so is a wrong branch for devices that are not the CPU.

    with pretend_device():
        model.to(DEVICE)
        model(batch.to(DEVICE)).sum().backward()
        model.weight.grad.cpu()

Neither speed nor kernels are pretended. torch.compile does not know these tensors, and threads that are started inside
have no backward. torch takes one such device a process, for good: outside of `pretend_device` it is there, but not
available, and nothing else changes.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from support.devices.pretend_operators import CELLS, register_casts

DEVICE = "pretend"
CAN_PRETEND = hasattr(
    backend_registration, "_setup_privateuseone_for_python_backend"
)  # not so in old versions of torch

Observer = Callable[[Any, Any, Any], None]
OBSERVERS: list[Observer] = []  # each is called with an operator, what it was given, and what it returned

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}  # from any device to any other
LOOKUPS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by indices on the CPU too
WITH_LENGTHS = {"aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"}  # on the CPU, always
SHALLOW = "aten::_has_compatible_shallow_copy_type"

_state = {"registered": False, "active": False}
_libraries: list[Any] = []  # an override lasts as long as its library
_generators: WeakValueDictionary[int, Any] = WeakValueDictionary()  # those of the device, by what torch holds of each
_CpuGenerator = torch.Generator
_set_data = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Pretend(torch.Tensor):
    """A tensor that says it is on the device; `raw` holds its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        with torch.inference_mode(raw.is_inference()):  # a view of another tensor is none of inference mode
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls,
                raw.shape,
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device=torch.device(DEVICE, 0),
            )
        made.raw = raw
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pretend({self.raw})"

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Any) -> None:
        _set_data(self, value)
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy.")
        return self.detach().cpu().numpy()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only tensors that no operator made can be copied.")
        made: Any = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = made
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "raw"})
        made.grad = None if self.grad is None else copy.deepcopy(self.grad, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save as a tensor of a device with storages, whose file says where they were."""
        storage: Any = self.raw.untyped_storage()
        storage.pretended = True
        made: Any = torch.storage.TypedStorage
        typed = made(wrap_storage=storage, dtype=self.dtype, _internal=True)
        where = self.storage_offset(), tuple(self.shape), self.stride()
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (Pretend(self.raw), self.requires_grad, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (typed, *where, self.requires_grad, OrderedDict())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Storage(torch.UntypedStorage):
    """What torch.load makes a tensor of the device from."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(DEVICE, 0)


def _tag(storage: Any) -> str | None:
    """Return what torch.save writes for a storage."""
    return f"{DEVICE}:0" if getattr(storage, "pretended", False) else None


def _restore(storage: Any, location: str) -> torch.UntypedStorage | None:
    """Put a storage where torch.load was asked to, or where the file says that it was."""
    if not str(location).startswith(DEVICE):
        return None
    made: Any = _Storage
    return made(storage.nbytes()).copy_(storage)  # type: ignore[no-any-return]


class _AnyGenerator(type(_CpuGenerator)):  # type: ignore[misc]
    """So that one of the CPU is a torch.Generator still."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return issubclass(type(instance), _CpuGenerator)


class _Generator(_CpuGenerator, metaclass=_AnyGenerator):
    """A generator of the device. It draws what one of the CPU draws."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if not _is_there(device):
            return _CpuGenerator(device)
        make: Any = _CpuGenerator.__new__
        made = make(cls, "cpu")
        _generators[made._cdata] = made
        return made


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is given no tensor of the device may make one, as torch.eye(3, device="pretend") does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Pretend in types or _is_there(kwargs.get("device")):
            return _run(func, args, kwargs)
        _refuse_generator(func.name(), kwargs.get("generator"), there=False)
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


@functools.cache
def _kind(func: Any) -> tuple[str, bool, bool]:
    """Return an operator's name, and whether it is made of others, and whether it changes what it is given."""
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return func.name().split(".")[0], made_of_others, func._schema.is_mutable


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, and say that what it makes is on the device."""
    name, made_of_others, is_mutable = _kind(func)
    if made_of_others:
        return func.decompose(*args, **kwargs)  # in inference mode; elsewhere autograd comes first, and does so
    leaves, form = pytree.tree_flatten((args, kwargs))
    pretended = [leaf for leaf in leaves if isinstance(leaf, Pretend)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretend)]
    if name == SHALLOW:
        return not others
    _refuse_two_devices(name, args, pretended, others)
    device = kwargs.get("device")
    there = bool(pretended) if device is None else _is_there(device)
    _refuse_generator(name, kwargs.get("generator"), there)
    values = [leaf.raw if isinstance(leaf, Pretend) else leaf for leaf in leaves]
    raw_args, raw_kwargs = pytree.tree_unflatten(values, form)
    if device is not None:
        raw_kwargs["device"] = torch.device("cpu")
    known = {id(tensor.raw): tensor for tensor in pretended}

    def back(raw: Any) -> Any:
        if not isinstance(raw, torch.Tensor) or id(raw) in known:
            return known.get(id(raw), raw)
        lengths = name in WITH_LENGTHS and not raw.is_floating_point()
        return Pretend(raw) if there and not lengths else raw

    found = CELLS.get(name, func)(*raw_args, **raw_kwargs)
    made = back(found) if isinstance(found, torch.Tensor) else pytree.tree_map(back, found)
    if is_mutable:
        for tensor in pretended:
            if (tensor.shape, tensor.stride()) != (tensor.raw.shape, tensor.raw.stride()):  # as resize_ does
                _set_data(tensor, Pretend(tensor.raw))
    made = args[0] if name == "aten::copy_" else made
    for observe in OBSERVERS:
        observe(func, leaves, made)
    return made


def _refuse_two_devices(name: str, args: Any, pretended: list[Pretend], others: list[torch.Tensor]) -> None:
    """Raise as a GPU does, which takes numbers without a dimension from the CPU, and indices."""
    others = [tensor for tensor in others if tensor.dim() > 0] if pretended else []
    takes_both = name in COPIES | WITH_LENGTHS or (name in LOOKUPS and isinstance(args[0], Pretend))
    if not others or takes_both:
        return
    shapes = [tuple(tensor.shape) for tensor in others]
    raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu, {shapes}")


def _refuse_generator(name: str, generator: torch.Generator | None, there: bool) -> None:
    if generator is not None and (generator._cdata in _generators) != there:  # type: ignore[attr-defined]
        raise RuntimeError(f"{name}: expected a {DEVICE if there else 'cpu'!r} device type for generator")


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
    memory_format = options.get("memory_format") or torch.contiguous_format
    return Pretend(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, **_: Any) -> torch.Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    to, values = (tensor.raw if isinstance(tensor, Pretend) else tensor for tensor in (self, source))
    to.copy_(values)
    return self


def _register() -> None:
    """Tell torch of the device, once."""
    if _state["registered"]:
        return
    if not CAN_PRETEND:
        pytest.skip("this torch takes no device that is written in Python")
    # A backward before the device is known: else autograd starts a thread for the device, and no fork of this process
    # could run a backward any more.
    torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, run in {"empty.memory_format": _empty, "empty_strided": _empty_strided, "copy_": _copy_}.items():
        library.impl(name, run, "PrivateUse1")  # what C++ calls past the modes, as for torch.tensor([1], device=...)
    _libraries.extend((library, *register_casts(library, DEVICE)))
    torch.serialization.register_package(5, _tag, _restore)  # before torch's own, which sees a storage of the CPU
    _state["registered"] = True


@contextmanager
def pretend_device() -> Iterator[str]:
    """Make the device available, and give its name. The test is skipped where torch is too old for it."""
    _register()
    before = _state["active"]
    _state["active"], torch.Generator = True, _Generator  # type: ignore[misc]
    try:
        # Backward runs in this thread: autograd has none for this device.
        with torch.autograd.set_multithreading_enabled(False), _Mode():  # type: ignore[no-untyped-call]
            yield DEVICE
    finally:
        _state["active"] = before
        if not before:
            torch.Generator = _CpuGenerator  # type: ignore[misc]
