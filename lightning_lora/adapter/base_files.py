"""The fingerprint of a base on disk, compared with the fingerprint that an adapter holds."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

from ..files.weights import Weights
from .adapter import Adapter
from .fingerprint import Entry, compare_fingerprints, entry_of, evenly_chosen, fingerprint_entries


def fingerprint_of_files(tensors: Mapping[str, torch.Tensor], chosen: Set[str] | None = None) -> dict[str, Entry]:
    """Return the entries of tensors, those that are chosen with values; by default as evenly_chosen says."""
    chosen = evenly_chosen(list(tensors)) if chosen is None else chosen
    values = fingerprint_entries((name, tensor) for name, tensor in tensors.items() if name in chosen)
    return {name: values.get(name) or entry_of(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def compare_with_files(adapter: Adapter, base: Weights, *, strict: bool, remedy: str, of_quantization: str) -> None:
    """Raise LoRAError, or warn, where weights on disk are not the adapter's base.

    A name that only one of the two has is ignored, because a file may hold tied weights once. So is a table whose rows
    the adapter replaces.

    Args:
        adapter: under the names of the weights.
        base: the weights.
        strict: whether another base is an error or a warning.
        remedy: the advice at the end of the error.
        of_quantization: the advice instead where the adapter's base was quantized, which no weights on disk can be.
    """
    ignored = {f"{module}.weight" for module in (*base.quantized(), *adapter.tables, *adapter.tied)}
    expected = {name: e for name, e in adapter.fingerprint.items() if name not in ignored and name in base.tensors}
    with_values = {name for name, entry in expected.items() if entry.values}
    present = fingerprint_of_files({name: base.tensors[name] for name in expected}, with_values)
    compare_fingerprints(present, expected, strict=strict, remedy=remedy, of_quantization=of_quantization)
