"""The names of a model's modules. A shared module has several, and is adapted under the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ..adapter.adapter import Adapter
from ..names import join_names


class Names:
    """All names of a model's modules, and which is the first name of each module."""

    def __init__(self, places: Iterable[tuple[str, nn.Module]]) -> None:
        """Take every module under every name."""
        self.modules: dict[str, nn.Module] = {}
        self.later: dict[str, str] = {}  # a module's later names, each with its first one
        first: dict[nn.Module, str] = {}
        for name, module in places:
            self.modules[name] = module
            if first.setdefault(module, name) != name:
                self.later[name] = first[module]

    def first(self, name: str) -> str:
        """Return the first name of the module or tensor that is called `name`."""
        if name in self.modules:
            return self.later.get(name, name)
        path, _, leaf = name.rpartition(".")
        return join_names(self.later[path], leaf) if path in self.later else name


def by_first_names(names: Names, adapter: Adapter) -> Adapter:
    """Rename layers to the first name of their module. A shared module is adapted under its first name."""
    if not names.later:
        return adapter
    scope = adapter.scope and f"{names.first(adapter.scope.removesuffix('.'))}."
    # each name of a shared module has foreign entries of its own
    return replace(adapter.with_names(names.first), scope=scope, foreign=adapter.foreign)
