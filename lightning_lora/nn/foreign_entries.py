"""What modules write into state_dict() beside parameters, buffers and extra state, called foreign entries here.

A persistent metric writes its states so, and layers of other libraries write packed weights. Only the module that wrote
them knows what they are. So they are kept as they came, and load_state_dict hands them back to the module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..names import canonical, join_names, parent_names, rename_keys

METADATA = "_metadata"  # torch's attribute of a state dict: by module, the version of what it wrote


@dataclass(frozen=True)
class ForeignEntries:
    """Hold foreign entries of a state dict.

    Attributes:
        values: by the name in the state dict.
        versions: what the state dict's metadata says of each module around them, by the module's name.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    def with_names(self, new_name: Callable[[str], str | None]) -> ForeignEntries:
        """Return the entries under new names, without those whose new name is None."""

        def new_module(module: str) -> str | None:
            name = new_name(join_names(module, "x"))
            return None if name is None else name.removesuffix("x").removesuffix(".")

        return ForeignEntries(rename_keys(self.values, new_name), rename_keys(self.versions, new_module))


def foreign_of(state: Mapping[str, Any], names: Collection[str]) -> ForeignEntries:
    """Return some entries of a state dict with the versions of the modules around them, without wrappers' segments."""
    values = {canonical(name): state[name] for name in names}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.detach()  # HQQLinear writes tensors that autograd has computed; no copy takes those
    around = {module for name in values for module in ("", *parent_names(name))}
    versions = {canonical(module): version for module, version in metadata_of(state).items()}
    return ForeignEntries(values, {module: version for module, version in versions.items() if module in around})


def metadata_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict's metadata by module, or nothing where it has none."""
    metadata = getattr(state, METADATA, None)
    return dict(metadata) if isinstance(metadata, Mapping) else {}  # of a damaged file it may be anything


def with_metadata(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with metadata, as state_dict() returns it."""
    described = OrderedDict(state)
    setattr(described, METADATA, dict(metadata))
    return described
