"""Lightning under its two names, `lightning.pytorch` and `pytorch_lightning`: the same code with separate classes.

A program imports one of them, sometimes both. None is imported here before the program does, since that takes time and
sends Lightning's messages through the logger of the one that came last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

Action = Callable[[ModuleType], None]


def imported_packages() -> list[ModuleType]:
    """List the packages of Lightning that the program has imported completely."""
    modules = [sys.modules.get(name) for name in PACKAGES]
    return [module for module in modules if module is not None and hasattr(module, "Trainer")]


def first_package() -> ModuleType:
    """Return the package of Lightning that the program has imported, `lightning.pytorch` if both or none."""
    return next(iter(imported_packages()), None) or import_module(PACKAGES[0])


def package_of(cls: type) -> str | None:
    """Name the package of Lightning from which a class is derived."""
    modules = (base.__module__ for base in cls.__mro__)
    return next((name for module in modules for name in PACKAGES if f"{module}.".startswith(f"{name}.")), None)


def is_overridden(name: str, module: nn.Module) -> bool:
    """Tell whether a LightningModule of either package has a method of its own in the place of Lightning's."""
    if name in vars(module):
        return True
    owner = next((cls for cls in type(module).__mro__ if name in vars(cls)), None)
    return owner is not None and all(owner not in package.LightningModule.__mro__ for package in imported_packages())


def for_each_package(action: Action) -> None:
    """Call `action` with each package of Lightning: now if it is imported, else as soon as the program imports it."""
    for package in imported_packages():
        action(package)
    sys.meta_path.insert(0, _ImportWatcher(action))


def become_callback(cls: type) -> None:
    """Make every instance of a class one of each package's Callback, as its Trainer and its command line ask."""
    for_each_package(partial(_derive_from_callback, cls))


def _derive_from_callback(cls: type, package: ModuleType) -> None:
    if not issubclass(cls, package.Callback):
        cls.__bases__ += (package.Callback,)


class _ImportWatcher:
    """Calls `action` when a package of Lightning was executed; what finds and loads it is left as it is."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self.searching = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in PACKAGES or self.searching:
            return None
        self.searching = True  # the other finders' answer is wanted
        try:
            spec = find_spec(name)
        finally:
            self.searching = False
        if spec is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = exec_module
