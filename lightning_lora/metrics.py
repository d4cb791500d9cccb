"""Metrics of merging, as torchmetrics, so that they are right over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric


def _square_of_norm(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, a scalar. On the CPU it is computed in float64, elsewhere in the dtype of the values.

    Many GPUs run float64 at 1/64 of their speed.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(values.double() if values.device.type == "cpu" else values)
    return norm.square()


class _RatioOfNorms(Metric):
    """Norm of all errors that were added, divided by the norm of all references that were added."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    error: torch.Tensor
    reference: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error", "reference"):  # sums of squares
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, error: torch.Tensor, reference: torch.Tensor) -> None:
        # Not in place: tensors of inference mode may not be changed outside of it.
        self.error = self.error + _square_of_norm(error).to(self.error.device)
        self.reference = self.reference + _square_of_norm(reference).to(self.error.device)

    def _ratio(self) -> torch.Tensor:
        return torch.where(self.reference > 0, (self.error / self.reference).sqrt(), torch.zeros_like(self.error))


class MergeFidelity(_RatioOfNorms):
    """Share of the adapter that is lost when W' is rounded to the layer's dtype: |round(W + d) - (W + d)| / |d|.

    0 means that merged and unmerged layers agree. In bfloat16 an adapter of 1 % of W's norm loses about 0.17.

    Example::

        >>> fidelity, delta = MergeFidelity(), torch.tensor([0.01, 0.0])
        >>> exact = torch.tensor([1.0, 1.0]) + delta
        >>> fidelity.update(exact.bfloat16().float(), exact, delta)
        >>> print(round(fidelity.compute().item(), 2))
        0.22
    """

    def update(self, rounded: torch.Tensor, exact: torch.Tensor, delta: torch.Tensor) -> None:
        """Add a part of a weight: the rounded sum, the exact sum and the delta, all of one shape and one dtype."""
        self._add(rounded - exact, delta)

    def compute(self) -> torch.Tensor:
        """Return a scalar; 0 for an adapter that is zero."""
        return self._ratio()


class MergeError(_RatioOfNorms):
    """Difference of merged and factored outputs: the largest one, and the relative one in norm.

    Example::

        >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)
        >>> names = inject(model, LoRAConfig(r=1, init_lora_weights=False))
        >>> with merged(model):
        ...     outputs = model(x)
        >>> print(MergeError()(outputs, model(x))["max"].item() < 1e-5)
        True
    """

    largest: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, merged: torch.Tensor, factored: torch.Tensor) -> None:
        """Add the outputs for a batch, of the model or of one layer: two tensors of the same shape."""
        difference = merged.double() - factored.double()
        self.largest = torch.maximum(self.largest, difference.abs().max().to(self.largest.device))
        self._add(difference, factored)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return two scalars: "max", in the unit of the outputs, and "relative", a ratio of norms."""
        return {"max": self.largest, "relative": self._ratio()}
