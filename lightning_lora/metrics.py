"""What merging costs, as torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric


class MergeFidelity(Metric):
    """Share of the adapter that rounding W' to the layer's dtype loses: |round(W + d) - (W + d)| / |d|.

    0 means that merged and unmerged layers agree; in bfloat16 an adapter of 1 % of W's norm loses about 0.17.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    error: torch.Tensor
    delta: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("delta", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rounded: torch.Tensor, exact: torch.Tensor, delta: torch.Tensor) -> None:
        """Add one block: the rounded sum, the exact sum and the delta, all of one shape and one dtype."""
        self.error += _squared_norm(rounded - exact).to(self.error.device)
        self.delta += _squared_norm(delta).to(self.delta.device)

    def compute(self) -> torch.Tensor:
        """A scalar; 0 for an adapter that is zero."""
        return torch.where(self.delta > 0, (self.error / self.delta).sqrt(), torch.zeros_like(self.error))


class MergeError(Metric):
    """How far merged outputs are from factored ones: the largest difference, and the relative one in norm."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    largest: torch.Tensor
    error: torch.Tensor
    total: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, merged: torch.Tensor, factored: torch.Tensor) -> None:
        """Add the outputs of one layer, of one shape."""
        difference = (merged.double() - factored.double()).to(self.error.device)
        self.largest = torch.maximum(self.largest, difference.abs().max())
        self.error = self.error + _squared_norm(difference)  # not in place: a watch may begin in inference mode
        self.total = self.total + _squared_norm(factored).to(self.total.device)

    def compute(self) -> dict[str, torch.Tensor]:
        """Scalars "max", in the unit of the outputs, and "relative", the norm of the difference over the outputs'."""
        relative = torch.where(self.total > 0, (self.error / self.total).sqrt(), torch.zeros_like(self.error))
        return {"max": self.largest, "relative": relative}


class LayerUse(Metric):
    """In how many processes each layer ran, and in how many its adapter changed the output."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: torch.Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(2, layers, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ran: Sequence[bool], acted: Sequence[bool]) -> None:
        """Add a process, with one value for each layer."""
        self.counts = self.counts + torch.tensor([ran, acted], dtype=torch.int64, device=self.counts.device)

    def compute(self) -> torch.Tensor:
        """int64 (2, layers): ran, acted."""
        return self.counts


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values.double())
    return norm.square()
