"""Support both packages of Lightning, `lightning.pytorch` and `pytorch_lightning`: the same code, separate classes.

A program imports one of them, sometimes both. This file imports neither before the program does. An import takes time,
and Lightning's messages go through the logger of the package that was imported last.
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
    """Return the package of Lightning that the program has imported; `lightning.pytorch` for both or none."""
    return next(iter(imported_packages()), None) or import_module(PACKAGES[0])


def package_of(cls: type) -> str | None:
    """Return the name of the package of Lightning that a class is derived from, or None."""
    modules = (base.__module__ for base in cls.__mro__)
    return next((name for module in modules for name in PACKAGES if f"{module}.".startswith(f"{name}.")), None)


def is_overridden(name: str, module: nn.Module) -> bool:
    """Return whether a LightningModule, of either package, overrides a method of Lightning."""
    if name in vars(module):
        return True
    owner = next((cls for cls in type(module).__mro__ if name in vars(cls)), None)
    return owner is not None and all(owner not in package.LightningModule.__mro__ for package in imported_packages())


def for_each_package(action: Action) -> None:
    """Call `action` with each package of Lightning: now if it is imported, otherwise when the program imports it."""
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
    """Import hook that calls `action` after a package of Lightning was executed. It finds and loads nothing itself."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self.searching = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in PACKAGES or self.searching:
            return None
        self.searching = True  # find_spec below asks this finder too, which must not answer
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
