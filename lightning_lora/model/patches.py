"""Replace methods of single modules in a way that copies and pickles of the modules keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import LoRAError


def patch(module: Any, name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Replace a method of one module by function(module, previous, *arguments, ...). In place; harmless when repeated.

    The patch is a functools.partial, because a closure cannot be pickled and a copied closure acts on the original
    module.

    Args:
        module: the module.
        name: of the method.
        function: called with the module, the earlier replacement of the method on this module (or None), `arguments`
            and the caller's arguments. It is a function of a module of this package, so that unpatch finds it.
        arguments: what the function needs.

    Raises:
        LoRAError: the module has no such method. Nobody would call the replacement, which would be noticed late.
    """
    if not hasattr(module, name):
        raise LoRAError(
            f"{type(module).__name__}: it has no method {name!r}, in the place of which lightning_lora puts its own. "
            f"The version of {type(module).__module__.partition('.')[0]} is not known here: install an older one, or a "
            "newer lightning_lora."
        )
    if not is_patched(module, name, function):
        setattr(module, name, functools.partial(function, module, vars(module).get(name), *arguments))


def is_patched(module: Any, name: str, function: Callable[..., Any]) -> bool:
    """Return whether a method of one module is replaced by this function."""
    current = vars(module).get(name)
    return isinstance(current, functools.partial) and current.func is function


def unpatch_method(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Take one patch out; an earlier replacement of the method comes back. In place."""
    if is_patched(module, name, function):
        _restore_method(module, name)


def unpatch(modules: Iterable[nn.Module]) -> None:
    """Take every patch of this package out of these modules. In place."""
    package = __name__.partition(".")[0] + "."
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, functools.partial) and getattr(value.func, "__module__", "").startswith(package):
                _restore_method(module, name)


def call_previous(module: Any, previous: Callable[..., Any] | None, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that a patch replaces, and return its result."""
    return previous(*args, **kwargs) if previous else getattr(type(module), name)(module, *args, **kwargs)


def _restore_method(module: Any, name: str) -> None:
    previous = vars(module)[name].args[1]
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)
