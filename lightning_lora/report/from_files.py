"""Measure the updates of an adapter in a file, and with a base the norms of the weights that they change."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.base_files import compare_with_files
from ..adapter.fingerprint import without_base
from ..adapter.renaming import align_to_modules, by_network_names
from ..errors import LoRAError
from ..files.paths import PathLike
from ..files.safetensors import TensorLocation, read_rows
from ..files.weights import Weights, open_weights
from ..formats.sources import read_source
from ..nn.low_rank import MERGEABLE_DTYPES
from ..progress import progress_bar
from .updates import Updates, measure, refuse_empty, sum_of_squares

OTHER_BASE = (
    "Give the base that it was trained on as base (--base), or pass strict_base=False (--strict-base=false), which "
    "makes this a warning."
)
OF_QUANTISATION = (
    "Load the quantised model in Python, then load_adapter and plot_adapter(model); or pass strict_base=False "
    "(--strict-base=false), which compares with these unquantised weights."
)


def read_updates(
    source: PathLike | Mapping[str, Any] | Adapter, base: PathLike | None = None, *, strict_base: bool = True
) -> Updates:
    """Measure the adapter of a file, a folder or a state dict, or one in memory.

    Args:
        source: whatever load_adapter takes.
        base: the weights on disk that it was trained on, for norms relative to the weights'.
        strict_base: whether another base than the adapter's is an error or a warning.

    Raises:
        LoRAError: there is no adapter, it is damaged, or it does not fit the base.
    """
    where = str(source) if isinstance(source, (str, os.PathLike)) else "a state dict"
    where = "an adapter in memory" if isinstance(source, Adapter) else where
    adapter = without_base(read_source(source, verb="plot_adapter"))
    if base is None:
        return measure(where, by_network_names(adapter))
    refuse_empty(where, adapter)
    weights = open_weights(base)
    adapter = _fit(adapter, weights)
    compare_with_files(adapter, weights, strict=strict_base, remedy=OTHER_BASE, of_quantisation=OF_QUANTISATION)
    norms = {}
    with progress_bar("reading the base", len(adapter.layers)) as advance:
        for name in adapter.layers:
            norms[name] = _norm_in_files(adapter, name, weights)
            advance(1)
    return measure(where, adapter, norms)


def _fit(adapter: Adapter, base: Weights) -> Adapter:
    """Return the adapter with the names that the weights have on disk."""
    names = base.modules() | (set(base.locations) if adapter.parameters else set())
    try:
        return align_to_modules(adapter, names, str(base.path))
    except LoRAError as error:
        raise LoRAError(
            f"{error} Where the file has other names than the modules, load the model in Python, then load_adapter and "
            "plot_adapter(model)."
        ) from error


def _norm_in_files(adapter: Adapter, name: str, base: Weights) -> float:
    locations = [base.locations[weight] for weight in adapter.weight_names(name) if weight in base.locations]
    if not locations:
        raise LoRAError(
            f"plot: {base.path}: there is no weight of {name!r}, which the adapter updates. Load the model in Python, "
            "then load_adapter and plot_adapter(model)."
        )
    for location in locations:
        if location.dtype not in MERGEABLE_DTYPES:
            raise LoRAError(
                f"plot: {base.path}: the weight of {name!r} is {location.dtype}, which cannot be read as numbers. "
                "Give the base before quantisation as base (--base)."
            )
    return math.sqrt(sum(map(_square_in_file, locations)))


def _square_in_file(location: TensorLocation) -> float:
    with open(location.file, "rb") as file:
        return math.fsum(sum_of_squares(read_rows(file, location, start, count)) for start, count in location.chunks())
