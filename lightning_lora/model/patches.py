"""Methods replaced on one module, in a way that deepcopy and pickle follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def patch(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Shadow a method of one module with function(module, previous, ...).

    `previous` is what shadowed the class's method before, or None. A closure would not pickle, and a copy of it would
    act on the original module.
    """
    if not is_patched(module, name, function):
        setattr(module, name, functools.partial(function, module, vars(module).get(name)))


def is_patched(module: Any, name: str, function: Callable[..., Any]) -> bool:
    """Tell whether a method of one module is shadowed by this function."""
    current = vars(module).get(name)
    return isinstance(current, functools.partial) and current.func is function


def unpatch_method(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Take one patch out again; what shadowed the class's method before comes back."""
    if is_patched(module, name, function):
        _restore_method(module, name)


def unpatch(modules: Iterable[nn.Module]) -> None:
    """Take every patch of this package out of these modules."""
    package = __name__.partition(".")[0] + "."
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, functools.partial) and getattr(value.func, "__module__", "").startswith(package):
                _restore_method(module, name)


def call_previous(module: Any, previous: Callable[..., Any] | None, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that a patch shadows."""
    return previous(*args, **kwargs) if previous else getattr(type(module), name)(module, *args, **kwargs)


def _restore_method(module: Any, name: str) -> None:
    _, previous = vars(module)[name].args
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)
