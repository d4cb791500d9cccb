"""A pickle module for torch.load that builds tensors and plain containers, and placeholders for everything else.

Of all classes and functions that a file names, only the few below, which build tensors, are imported and called. So a
checkpoint whose hyper-parameters hold objects can be read for its tensors, whoever wrote it.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch

# All functions that a file can have called. torch.save writes them for tensors, shapes and devices. Their arguments are
# plain values or, in a malicious file, placeholders.
CALLED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_sparse_tensor": torch._utils._rebuild_sparse_tensor,
    "torch._utils._rebuild_meta_tensor_no_storage": torch._utils._rebuild_meta_tensor_no_storage,
}


class Placeholder:
    """Stand for an object, or for the result of a function, that a file names. Takes any arguments and does nothing."""

    stands_for: ClassVar[str] = ""  # the module and name in the file

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take any arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return self

    def _ignore(self, *args: Any) -> None:
        """Take what unpickling puts into an object."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Called:
    """Pass calls on to a function. A pickle can then call the function and not change its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _Storage:
    """Stand for a class of storages: torch.load needs nothing but the dtype."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        self.dtype = torch.uint8 if name == "UntypedStorage" else torch.serialization.StorageType(name).dtype  # type: ignore[no-untyped-call]

    __setstate__ = _Called.__setstate__


class Unpickler(pickle.Unpickler):
    """Find tensors' functions, storages and dtypes; any other name becomes a placeholder's class."""

    def __init_subclass__(cls) -> None:
        """Keep this find_class in the subclass that torch.load makes: torch's own takes storages from any module."""
        cls.find_class = Unpickler.find_class  # type: ignore[method-assign]

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return what stands for a class or function that the file names. Imports nothing."""
        name = f"{module_name}.{global_name}"
        vars(self).setdefault("named", set()).add(name)
        if name in CALLED:
            return _Called(CALLED[name])
        value = vars(torch).get(global_name) if module_name in ("torch", "torch.storage") else None
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, type) and issubclass(value, (torch.TypedStorage, torch.UntypedStorage)):
            return _Storage(global_name)
        return type("Placeholder", (Placeholder,), {"stands_for": name})


def find_placeholder(value: Any) -> tuple[str, str] | None:
    """Find a placeholder in nested containers.

    Returns:
        Its place, such as "['a'][0]", and the name that it stands for; None where there is no placeholder.
    """
    waiting, seen = deque([("", value)]), set()
    while waiting:
        place, item = waiting.popleft()
        if isinstance(item, Placeholder) or (isinstance(item, type) and issubclass(item, Placeholder)):
            return place, item.stands_for
        if id(item) in seen or not isinstance(item, (dict, list, tuple, set, frozenset)):
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting.extend((place, key) for key in item)
        parts = item.items() if isinstance(item, dict) else enumerate(item)
        waiting.extend((f"{place}[{key!r}]", part) for key, part in parts)
    return None
