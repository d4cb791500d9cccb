"""Measure what an adapter adds to each weight, s * B @ A, from the small factors: size and singular values."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter, nothing_adapted
from ..adapter.checks import check_factors
from ..adapter.measures import scaled_pairs
from ..adapter.products import effective_rank, singular_values
from ..adapter.renaming import by_network_names
from ..errors import LoRAError
from ..exchange.take import adapter_here
from ..files.paths import PathLike
from ..formats.sources import read_source
from ..model.adapted_model import open_model
from ..names import names_factor
from ..progress import progress_bar


@dataclass(frozen=True)
class Update:
    """The update of one layer or parameter, s * B @ A, measured in float64.

    Attributes:
        spectra: the singular values of each matrix (an expert, an adapted part), largest first. There are r of them,
            or up to 2 r where the start is subtracted.
        size: the number of weights that the update changes.
    """

    spectra: tuple[tuple[float, ...], ...]
    size: int

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return math.hypot(*(value for spectrum in self.spectra for value in spectrum))

    @property
    def ranks(self) -> list[float]:
        """The effective rank of each matrix, as adapter_stats measures it."""
        return [float(effective_rank(torch.tensor(spectrum, dtype=torch.float64))) for spectrum in self.spectra]


@dataclass(frozen=True)
class Updates:
    """The updates of an adapter by layer. Where s is not known, `scaled` is false and they are B @ A."""

    layers: Mapping[str, Update]
    scaled: bool


def measure(source: PathLike | Mapping[str, Any] | Adapter | nn.Module) -> Updates:
    """Measure the updates of an adapter. B @ A is not built. Collective where a model is sharded.

    Args:
        source: an injected model, merged or not, or whatever load_adapter takes.

    Raises:
        LoRAError: there is no adapter, it has no layer with A and B, or its factors are damaged or not finite.
    """
    where = str(source) if isinstance(source, (str, os.PathLike)) else "the adapter"
    if isinstance(source, nn.Module):
        adapter = adapter_here(open_model(source, "plot_adapter"), "plot_adapter")
    else:
        adapter = read_source(source, verb="plot_adapter")
    if not adapter.layers:
        found = "rows of tables alone, which are no low-rank updates" if adapter.rows() else nothing_adapted(adapter)
        raise LoRAError(f"plot: {where} holds {found}; there is nothing to draw.")
    factors = {name: value.cpu() for name, value in adapter.tensors.items() if names_factor(name)}
    adapter = by_network_names(replace(adapter, tensors=factors))
    check_factors(adapter, f"plot: {where}")
    layers = {}
    with progress_bar("measuring", len(adapter.layers)) as advance:
        for name, layer in adapter.layers.items():
            pairs = scaled_pairs(adapter, name)
            spectra = tuple(_spectrum(left, right, layer.r) for left, right in pairs)
            layers[name] = Update(spectra, sum(left.shape[0] * right.shape[1] for left, right in pairs))
            advance(1)
    return Updates(layers, scaled=any(layer.scaling is not None for layer in adapter.layers.values()))


def _spectrum(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[float, ...]:
    """Return the singular values of left @ right, largest first; at least r, with zeros where the rank is lower."""
    values = singular_values(left, right).tolist()
    return tuple(values[: max(rank, min(left.shape[0], right.shape[1]))])
