"""Adapted linear layers: nn.Linear, transformers' Conv1D and fused projections."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from ..distributed.sharding import is_sharded
from ..distributed.tensor_parallel import low_rank
from ..names import A, B
from .lora_layer import LoRALayer
from .low_rank import Piece


class LoRALinear(LoRALayer):
    """nn.Linear: weight (out, in), A (r, in), B (out, r); with enabled parts A (n*r, in), B (n*out/len, r)."""

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self._features()
        parts = self.lora_enabled or (True,)
        return (sum(parts) * self.lora_r, in_features), (out_features // len(parts) * sum(parts), self.lora_r)

    def _features(self) -> tuple[int, int]:
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def parts(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first output, A, B) of each adapted part; a plain layer is one part."""
        if self.lora_enabled is None:
            return [(0, factor_a, factor_b)]
        size = self._features()[0] // len(self.lora_enabled)
        starts = [i * size for i, enabled in enumerate(self.lora_enabled) if enabled]
        return list(zip(starts, torch.split(factor_a, self.lora_r), torch.split(factor_b, size), strict=True))

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(start, 0, b, a) for start, a, b in self.parts(factor_a, factor_b)]}

    def factored_forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.lora_enabled is None and input.dim() > 1 and type(input) is torch.Tensor and input.is_contiguous():
            return self._accumulated(input)
        return self._concatenated(input)

    def _accumulated(self, input: torch.Tensor) -> torch.Tensor:
        """The adapter's product summed straight into the base's output: one full-size tensor instead of three."""
        rows = input.view(-1, input.shape[-1])
        x, scaling = self.dropped(rows)
        # These layouts make autograd form both gradients with the thin factor on the left: several times faster on CPU.
        hidden = torch.mm(self.lora_A.to(x.dtype), x.t())
        # After hidden, so that its gradient of the input is there first: no view, so the other is added in place.
        base = cast(torch.Tensor, self.base_forward(rows))
        base.addmm_(hidden.t(), self.lora_B.to(base.dtype).t().contiguous(), alpha=scaling)
        # Not a view to autograd: fully_shard's hooks on the output would be lost to an in-place change of one.
        shape = (*input.shape[:-1], base.shape[-1])
        return base if input.dim() == 2 else cast(torch.Tensor, torch.ops.aten._unsafe_view(base, shape))

    def _concatenated(self, input: torch.Tensor) -> torch.Tensor:
        """For parts of a fused projection, and for inputs that cannot be seen as rows."""
        base = self.base_forward(input)
        x, scaling = self.dropped(input)
        if is_sharded(x) and self.lora_enabled is None:
            product = low_rank(x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
            if product is not None:
                return cast(torch.Tensor, base + product * scaling)
        outputs, done = [], 0
        for start, a, b in self.parts(self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)):
            if start > done:
                outputs.append(base.new_zeros(*base.shape[:-1], start - done))
            outputs.append(F.linear(F.linear(x, a), b) * scaling)
            done = start + b.shape[0]
        if done < base.shape[-1]:
            outputs.append(base.new_zeros(*base.shape[:-1], base.shape[-1] - done))
        adapted = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return cast(torch.Tensor, base + adapted)


class LoRAConv1D(LoRALinear):
    """transformers' Conv1D, a linear layer with its weight stored (in, out); A and B as for nn.Linear."""

    ALONG = {0: (A, 1), 1: (B, 0)}  # noqa: RUF012

    def _features(self) -> tuple[int, int]:
        in_features, out_features = self.weight.shape
        return out_features, in_features

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(0, start, a.T, b.T) for start, a, b in self.parts(factor_a, factor_b)]}

    def factored_forward(self, x: torch.Tensor) -> torch.Tensor:  # as Conv1D names it
        return super().factored_forward(x)
