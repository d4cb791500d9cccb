"""Measure what an adapter adds to each weight, from the small factors: norms, singular values, cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..adapter.adapter import Adapter, nothing_adapted
from ..adapter.measures import cosine, scaled_pairs
from ..adapter.products import singular_values
from ..errors import LoRAError
from ..files.safetensors import CHUNK
from ..progress import progress_bar
from .layout import Cell, cells


@dataclass(frozen=True)
class Update:
    """The update of one layer or parameter, s * B @ A, measured in float64.

    Attributes:
        rank: r.
        spectra: the singular values of each part, expert or matrix, largest first. There are r of them, or more where
            a variant's update has a higher rank.
        shapes: rows and columns of each part, expert or matrix.
        weight_norm: Frobenius norm of the weight, or None where it is not known.
    """

    rank: int
    spectra: tuple[tuple[float, ...], ...]
    shapes: tuple[tuple[int, int], ...]
    weight_norm: float | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return math.hypot(*(value for spectrum in self.spectra for value in spectrum))

    @property
    def size(self) -> int:
        """The number of weights that the update changes."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def has_full_rank(self) -> bool:
        """Whether r is as large as the smaller side of each matrix, so that a larger r would add nothing."""
        return all(self.rank >= min(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Updates:
    """The updates of an adapter.

    Attributes:
        source: a short name of where the adapter comes from.
        adapter: the adapter itself.
        layers: the update of each layer or parameter, by name.
        scaled: whether s is known; otherwise 1 is used.
        beside: the names of other layers in the same picture.
    """

    source: str
    adapter: Adapter
    layers: Mapping[str, Update]
    scaled: bool = True
    beside: tuple[str, ...] = ()

    @property
    def relative(self) -> bool:
        """Whether the norms of the weights are known."""
        return all(update.weight_norm is not None for update in self.layers.values())

    @cached_property
    def cells(self) -> dict[Cell, list[str]]:
        """The names of the layers in each cell of a picture."""
        return cells(self.layers, self.beside)

    def norms(self, *, relative: bool) -> dict[Cell, float]:
        """Return the size of the update in each cell of a picture; layers that share a cell are taken together.

        Args:
            relative: return the norm of the update over the norm of the weights, which is infinite for zero weights.
                Otherwise return the root mean square of the update.
        """
        return {cell: self._norm([self.layers[name] for name in names], relative) for cell, names in self.cells.items()}

    def size_of(self, cell: Cell) -> int:
        """Return the number of weights that the updates of a cell change."""
        return sum(self.layers[name].size for name in self.cells[cell])

    def _norm(self, updates: Sequence[Update], relative: bool) -> float:
        norm = math.hypot(*(update.norm for update in updates))
        if not relative:
            return norm / math.sqrt(sum(update.size for update in updates)) if norm else 0.0
        weights = math.hypot(*(update.weight_norm or 0.0 for update in updates))
        return norm / weights if weights else (math.inf if norm else 0.0)


def measure(source: str, adapter: Adapter, weight_norms: Mapping[str, float] | None = None) -> Updates:
    """Measure the updates of an adapter. B @ A is not built.

    Args:
        source: a path, or a few words on where the adapter comes from.
        adapter: the adapter.
        weight_norms: the Frobenius norm of each layer's weight, by the adapter's names.

    Raises:
        LoRAError: the adapter has no layer with A and B.
    """
    refuse_empty(source, adapter)
    layers = {}
    with progress_bar("measuring", len(adapter.layers)) as advance:
        for name, layer in adapter.layers.items():
            pairs = scaled_pairs(adapter, name)
            shapes = tuple((left.shape[0], right.shape[1]) for left, right in pairs)
            spectra = tuple(_spectrum(left, right, layer.r) for left, right in pairs)
            layers[name] = Update(layer.r, spectra, shapes, (weight_norms or {}).get(name))
            advance(1)
    scaled = any(layer.scaling is not None for layer in adapter.layers.values())
    return Updates("/".join(Path(source).parts[-2:]), adapter, layers, scaled=scaled)


def _spectrum(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[float, ...]:
    """Return the singular values of left @ right, largest first; at least r, with zeros where the rank is lower."""
    values = singular_values(left, right).tolist()
    return tuple(values[: max(rank, min(left.shape[0], right.shape[1]))])


def refuse_empty(source: str, adapter: Adapter) -> None:
    """Raise LoRAError where an adapter has no layer with A and B."""
    if not adapter.layers:
        found = "rows of tables alone, which are no low-rank updates" if adapter.rows() else nothing_adapted(adapter)
        raise LoRAError(f"plot: {source} holds {found}; there is nothing to draw.")


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Return the sum of a tensor's squares, in float64 and a block at a time."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return math.fsum(float(part.to(dtype).square().sum()) for part in torch.split(tensor.reshape(-1), CHUNK))


def cosines(first: Updates, second: Updates) -> dict[Cell, float]:
    """Return the cosine between two adapters' updates in each cell that both have.

    Layers that share a cell are taken as one vector. The cosine is NaN where one of the two updates is zero, or where
    the shapes or parts of a layer differ.
    """
    found = {}
    for cell, names in first.cells.items():
        shared = [name for name in names if name in second.layers]
        if shared:
            found[cell] = _joint_cosine(first, second, shared)
    return found


def _joint_cosine(first: Updates, second: Updates, names: list[str]) -> float:
    try:
        inner = [
            value * first.layers[name].norm * second.layers[name].norm
            for name in names
            if not math.isnan(value := cosine(first.adapter, second.adapter, name))
        ]
    except ValueError:
        return math.nan
    norms = [math.hypot(*(each.layers[name].norm for name in names)) for each in (first, second)]
    return math.fsum(inner) / math.prod(norms) if inner and all(norms) else math.nan


def half_share(spectrum: tuple[float, ...]) -> float:
    """Return the share of the squared norm that the larger half of the directions holds; of an odd r, (r + 1) / 2.

    It is 1 where all other singular values are zero, and about 1/2 where all are equal. It is NaN for an update that is
    zero or not finite.
    """
    largest = max(spectrum)
    if not largest or not math.isfinite(largest):
        return math.nan
    energies = [(value / largest) ** 2 for value in spectrum]
    return math.fsum(energies[: (len(energies) + 1) // 2]) / math.fsum(energies)
