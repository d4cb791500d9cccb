"""The fingerprint of a base on disk, compared with the fingerprint that an adapter holds."""

from __future__ import annotations

from typing import Any

from ..files.safetensors import TensorLocation, read_elements
from ..files.weights import Weights
from .adapter import Adapter
from .fingerprint import compare_fingerprints, entry_of, sample_positions, warn_of_rounding, without_rows

# Advice in the error about another base, unless the caller gives its own.
OTHER_FILES = "Give the base that it was trained on as --base, or pass --strict-base=false, which makes this a warning."


def fingerprint_entry_at(location: TensorLocation) -> dict[str, Any]:
    """Return the entry of a tensor in a file, and read nothing but the sampled values."""
    return entry_of(location.shape, location.dtype, read_elements(location, sample_positions(location.numel)))


def compare_with_files(adapter: Adapter, base: Weights, *, strict: bool = True, remedy: str = OTHER_FILES) -> None:
    """Raise LoRAError, or warn, where weights on disk are not the adapter's base.

    A name that only one of the two has is ignored, because a file may hold tied weights once.
    """
    packed = {f"{module}.weight" for module in base.quantised()}
    named = adapter.fingerprint.keys() - packed
    locations = {name: base.locations[name] for name in adapter.fingerprint if name in named & base.locations.keys()}
    entries = {name: fingerprint_entry_at(location) for name, location in locations.items() if location.in_order}
    tables = {**{end: adapter.tables.get(first, ()) for end, first in adapter.tied.items()}, **adapter.tables}
    entries = without_rows(entries, tables)
    expected = without_rows({name: adapter.fingerprint[name] for name in entries}, tables)
    saved = (adapter.config and adapter.config.modules_to_save) or ()
    compare_fingerprints(entries, expected, strict=strict, remedy=remedy, saved=saved, adapted=adapter.layers())
    warn_of_rounding(entries, adapter.fingerprint)
