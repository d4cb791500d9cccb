"""Name adapters that have more parameters than the weights that they adapt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..names import listed
from ..nn.adapted_weights import AdaptedWeights
from ..nn.low_rank import SINGLE
from ..nn.quantised import shape_of


@dataclass(frozen=True)
class LargeAdapter:
    """Sizes of an adapter and of the weights that it adapts, which are several in a stack of experts."""

    name: str
    rank: int
    parameters: int  # of A and B
    weights: int  # of the adapted matrices
    most_rank: int  # the highest rank that an update can have: the smaller side of its matrix
    trains_whole: bool  # the layer can be trained whole by modules_to_save

    def __str__(self) -> str:
        useless = f"; no update has a rank above {self.most_rank}" if self.rank > self.most_rank else ""
        return f"{self.name!r} (r = {self.rank}: {self.parameters:,} parameters for {self.weights:,}{useless})"


def describe_large_adapters(layers: Mapping[str, AdaptedWeights]) -> str:
    """Return a sentence that names the adapters that are too large and says what to do, or "" where none is.

    An adapter is too large when it has more parameters than the weights that it adapts. Every adapter is whose r is
    above the smaller side of its matrix. An adapter of rank 1 is not named, because it cannot be smaller.
    """
    measured = (_measure(name, layer) for name, layer in layers.items() if layer.kind())
    large = [each for each in measured if each.rank > 1 and each.parameters > each.weights]
    if not large:
        return ""
    are = "adapter is too large for its layer" if len(large) == 1 else "adapters are too large for their layers"
    names = [repr(each.name) for each in large if each.trains_whole]
    whole = f", or train the layer whole, with modules_to_save=[{listed(names)}]" if names else ""
    return f"{len(large)} {are}: {listed(list(map(str, large)))}. Take a smaller r there, with rank_pattern{whole}."


def warn_of_large_adapters(layers: Mapping[str, AdaptedWeights]) -> None:
    """Warn of all adapters that are too large for their layers, in one warning."""
    described = describe_large_adapters(layers)
    if described:
        warnings.warn(f"lightning_lora: {described}", stacklevel=2)


def _measure(name: str, layer: AdaptedWeights) -> LargeAdapter:
    """Return an adapter's sizes. They are taken from low-rank blocks without values, on the meta device."""
    stored = {leaf: torch.empty(shape_of(tensor), device="meta") for leaf, tensor in layer.stored().items()}
    blocks = [block for of_weight in layer.update_blocks(stored).values() for block in of_weight]
    return LargeAdapter(
        name,
        layer.lora.spec.r,
        parameters=sum(shape.numel() for factor in layer.factors() if len(shape := shape_of(factor)) > 1),
        weights=sum(len(block.left) * block.right.shape[1] for block in blocks),
        most_rank=max(min(len(block.left), block.right.shape[1]) for block in blocks),
        trains_whole=layer.kind() not in SINGLE and not layer.quantised(),
    )
