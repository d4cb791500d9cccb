"""Frozen tensors that all adapted layers of a model share: one nn.Parameter each, registered in every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import copy_

Place = Any  # that of nn/variant.py, which stands on the same floor
Start = Callable[[Iterable[Place], int], Mapping[str, torch.Tensor]]  # a variant's start_shared


class SharedTensors:
    """The shared tensors of one model. All its layers hold this one object, also in a copy of the model.

    Attributes:
        parameters: by leaf name.
        start: returns what they start as for the places, the same each time.
        places: the layers.
        seed: what they are drawn from.
    """

    def __init__(self, start: Start, seed: int) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.start, self.seed = start, seed
        self.places: list[Place] = []
        self._shapes: dict[int, dict[str, torch.Size]] = {}  # by rank

    def fit_(self, places: Iterable[Place], like: nn.Parameter) -> None:
        """Make the tensors, or make them larger, so that they serve all these places. In place.

        Args:
            places: all layers that share them.
            like: has the dtype and device for new ones.
        """
        self.places = list(places)
        self._shapes.clear()
        for leaf, values in self.start(self.places, self.seed).items():
            known = self.parameters.get(leaf)
            if known is None:
                self.parameters[leaf] = nn.Parameter(values.to(like.device, like.dtype), requires_grad=False)
            elif known.shape != values.shape:
                known.data = values.to(known.device, known.dtype)

    def draw_(self, rank: int) -> None:
        """Let the tensors have their initial values, of layers of this rank. In place."""
        for leaf, values in self.start(self._places_by(rank), self.seed).items():
            copy_(self.parameters[leaf], values)

    def shapes(self, rank: int) -> dict[str, torch.Size]:
        """Return the shapes that the tensors have where all layers have this rank."""
        if rank not in self._shapes:
            values = self.start(self._places_by(rank), self.seed)
            self._shapes[rank] = {leaf: value.shape for leaf, value in values.items()}
        return self._shapes[rank]

    def _places_by(self, rank: int) -> list[Place]:
        """Return the places with another rank; those that differ in rank stay, and swaps of ranks are refused."""
        ranks = {place.rank for place in self.places}
        return self.places if len(ranks) > 1 else [replace(place, rank=rank) for place in self.places]

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None]) -> None:
        """Let a module share the tensors again, where torch has replaced its parameters by others. In place.

        The first module to come has new ones for all; those that come later take them.

        Args:
            module: an adapted layer.
            before: its parameters before they were replaced.
        """
        for leaf, shared in self.parameters.items():
            mine = module._parameters.get(leaf)
            if mine is None or mine is shared:
                continue
            if before.get(leaf) is shared:
                self.parameters[leaf] = mine
            else:
                module._parameters[leaf] = shared
