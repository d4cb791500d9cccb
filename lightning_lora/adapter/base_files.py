"""The fingerprint of a base on disk, compared with the fingerprint that an adapter holds."""

from __future__ import annotations

from collections.abc import Mapping

from ..files.safetensors import TensorLocation, read_elements
from ..files.weights import Weights
from .adapter import Adapter
from .fingerprint import Entry, compare_fingerprints, entry_of, evenly_chosen, sample_positions


def fingerprint_of_files(locations: Mapping[str, TensorLocation]) -> dict[str, Entry]:
    """Return the entries of tensors in files. Of many, values of some are read."""
    chosen = evenly_chosen(list(locations))
    return {name: _entry_at(location, with_values=name in chosen) for name, location in locations.items()}


def _entry_at(location: TensorLocation, *, with_values: bool) -> Entry:
    """Return the entry of a tensor in a file, and read nothing but the sampled values."""
    values = read_elements(location, sample_positions(location.numel)) if with_values else []
    return entry_of(location.shape, location.dtype, values)


def compare_with_files(adapter: Adapter, base: Weights, *, strict: bool, remedy: str, of_quantisation: str) -> None:
    """Raise LoRAError, or warn, where weights on disk are not the adapter's base.

    A name that only one of the two has is ignored, because a file may hold tied weights once. So is a table whose rows
    the adapter replaces.

    Args:
        adapter: under the names of the weights.
        base: the weights.
        strict: whether another base is an error or a warning.
        remedy: the advice at the end of the error.
        of_quantisation: the advice instead where the adapter's base was quantised, which no weights on disk can be.
    """
    ignored = {f"{module}.weight" for module in (*base.quantised(), *adapter.tables, *adapter.tied)}
    expected = {
        name: entry
        for name, entry in adapter.fingerprint.items()
        if name not in ignored and name in base.locations and base.locations[name].in_order
    }
    entries = {name: _entry_at(base.locations[name], with_values=bool(e.values)) for name, e in expected.items()}
    compare_fingerprints(entries, expected, strict=strict, remedy=remedy, of_quantisation=of_quantisation)
