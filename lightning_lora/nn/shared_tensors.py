"""Frozen tensors that all adapted layers of a model share: one nn.Parameter each, registered in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import copy_


class SharedTensors:
    """The shared tensors of one model. All its layers hold this one object, also in a copy of the model.

    Attributes:
        parameters: by leaf name.
        values: returns what they start as, the same each time.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.values: Callable[[], Mapping[str, torch.Tensor]] = dict

    def fit_(
        self, start: Callable[..., Mapping[str, torch.Tensor]], places: Any, seed: int, like: nn.Parameter
    ) -> None:
        """Make the tensors, or make them larger, so that they serve all these places. In place.

        Args:
            start: a variant's start_shared.
            places: of all layers that share them.
            seed: what they are drawn from; tensors that are there keep theirs.
            like: has the dtype and device for new ones.
        """
        if self.parameters and isinstance(self.values, partial):
            seed = self.values.args[1]
        self.values = partial(start, list(places), seed)
        for leaf, values in self.values().items():
            known = self.parameters.get(leaf)
            if known is None:
                self.parameters[leaf] = nn.Parameter(values.to(like.device, like.dtype), requires_grad=False)
            elif known.shape != values.shape:
                known.data = values.to(known.device, known.dtype)

    def draw_(self) -> None:
        """Let the tensors have their initial values. In place."""
        for leaf, values in self.values().items():
            copy_(self.parameters[leaf], values)

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
