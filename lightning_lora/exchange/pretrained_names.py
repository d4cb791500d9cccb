"""The names that transformers gives the tensors of older files, for adapters that were trained on such names.

A class may have other modules in a later transformers: what was language_model.model.layers in transformers 4 is
model.language_model.layers now. transformers 5 renames the tensors of such files when it loads them, and PEFT those of
adapters by the same rules. Rules that change values, as those that make one tensor out of several, are not followed
here: their tensors keep their names, and have no place in the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Set
from contextlib import suppress
from functools import partial
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.renaming import align_to_modules, by_network_names, renamed_by
from ..errors import LoRAError
from ..model.adapted_model import Listing
from ..model.pretrained import pretrained_models
from ..names import names_factor

Rename = Callable[[str], str]


def align_to_networks(adapter: Adapter, modules: Set[str], listing: Listing, first: Callable[[str], str]) -> Adapter:
    """Call align_to_modules; if no prefix fits, try the names of an earlier transformers.

    Args:
        adapter: under any prefix.
        modules: names of the model's modules.
        listing: of the model.
        first: gives the first name of a module that has several.

    Raises:
        LoRAError: its layers have no place.
    """
    where = type(listing.model).__name__
    try:
        return align_to_modules(adapter, modules, where, first)
    except LoRAError:
        for network in pretrained_models(listing.modules).values():
            rename = _renaming(network)
            if rename is None:
                continue
            renamed = renamed_by(by_network_names(adapter), partial(_renamed, rename=rename))
            with suppress(LoRAError):
                return align_to_modules(renamed, modules, where, first)
        raise


def _renamed(name: str, rename: Rename) -> str:
    """Rename a tensor of the base. A factor is renamed as the weight that it belongs to."""
    if not names_factor(name):
        return rename(name)
    layer, _, leaf = name.rpartition(".")
    weight = rename(f"{layer}.weight")
    return f"{weight.removesuffix('weight')}{leaf}" if weight.endswith(".weight") else name


def _renaming(network: Any) -> Rename | None:
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:  # before transformers 5
        return None
    try:
        transforms = mapping.get_model_conversion_mapping(network)
    except Exception:  # it may raise anything for a class that is not transformers' own
        return None
    renamings = [transform for transform in transforms if isinstance(transform, loading.WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, loading.WeightConverter)]

    def rename(name: str) -> str:
        new: str
        new, converter = loading.rename_source_key(name, renamings, converters)
        return new if converter is None else name

    return rename
