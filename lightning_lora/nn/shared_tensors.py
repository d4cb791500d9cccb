"""Frozen tensors that all adapted layers of a model share. Each is one nn.Parameter, registered in every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import copy_

Place = Any  # a Place of nn/variant.py; importing that file here would add a floor to the package
Start = Callable[[Iterable[Place], int], Mapping[str, torch.Tensor]]  # a variant's start_shared


class SharedTensors:
    """The shared tensors of one model. All layers of the model hold the same object; copies of a model keep that.

    Attributes:
        parameters: the shared tensors, by leaf name.
        start: returns their initial values for some places, the same each time.
        places: the layers that share them.
        seed: of the generator that the values are drawn from.
    """

    def __init__(self, start: Start, seed: int) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.start, self.seed = start, seed
        self.places: list[Place] = []
        self._shapes: dict[int, dict[str, torch.Size]] = {}  # by rank

    def fit_(self, places: Iterable[Place], like: nn.Parameter) -> None:
        """Create the tensors, or enlarge them, so that they are large enough for all these places. In place.

        Args:
            places: all layers that share the tensors.
            like: new tensors get the dtype and device of this one.
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
        """Give the tensors their initial values for layers of this rank. In place."""
        for leaf, values in self.start(self._places_by(rank), self.seed).items():
            copy_(self.parameters[leaf], values)

    def shapes(self, rank: int) -> dict[str, torch.Size]:
        """Return the shapes of the tensors for layers of this rank."""
        if rank not in self._shapes:
            values = self.start(self._places_by(rank), self.seed)
            self._shapes[rank] = {leaf: value.shape for leaf, value in values.items()}
        return self._shapes[rank]

    def _places_by(self, rank: int) -> list[Place]:
        """Return the places with another rank.

        Places of several ranks are returned unchanged: another rank is refused for such a model elsewhere.
        """
        ranks = {place.rank for place in self.places}
        return self.places if len(ranks) > 1 else [replace(place, rank=rank) for place in self.places]

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None]) -> None:
        """Make a module share the tensors again after torch replaced its parameters by separate ones. In place.

        The new parameters of the first module become the shared ones. Later modules get these.

        Args:
            module: an adapted layer.
            before: the module's parameters before the replacement.
        """
        for leaf, shared in self.parameters.items():
            mine = module._parameters.get(leaf)
            if mine is None or mine is shared:
                continue
            if before.get(leaf) is shared:
                self.parameters[leaf] = mine
            else:
                module._parameters[leaf] = shared
