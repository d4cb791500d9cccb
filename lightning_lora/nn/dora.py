"""DoRA (arXiv:2402.09353): A and B adapt the direction of each output's weights, and a magnitude m their norm.

    W' = c * V for each output,  V = W + s * B @ A,  c = m / norm(V)

norm(V) is a constant for the gradient, as in section 4.3 of the paper and in PEFT. m starts as norm(V), so c is exactly
1 before the first step. A device that the model moves to later may round norm(V) another way: c is then 1e-7 away from
1. An output whose weights are all zero starts with c = 1; in PEFT it gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..distributed.flat import Window
from ..distributed.sharding import detached
from ..names import A, B
from . import low_rank
from .lora import PEFT_LEAVES, LoRA
from .low_rank import LowRankBlock
from .output_norms import norms_of_weight, output_norms, squares_of_windows
from .variant import (
    EffectiveFactors,
    LayerInfo,
    Reader,
    Stored,
    Weight,
    scaled_blocks,
)

MAGNITUDE = "lora_magnitude"  # leaf name: (out,)


class DoRA(LoRA):
    """LoRA with a trained magnitude for each output (arXiv:2402.09353)."""

    name, title = "dora", "DoRA"
    trained: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE)
    peft_type = "LORA"
    peft_attention = False
    peft_leaves: ClassVar[Mapping[str, str]] = {
        **PEFT_LEAVES,
        "lora_magnitude_vector": MAGNITUDE,
        "lora_magnitude_vector.weight": MAGNITUDE,  # of a live model
    }
    split_like: ClassVar[Mapping[str, str]] = {}
    kinds = (low_rank.LINEAR, low_rank.CONV1D, low_rank.CONV, low_rank.EMBEDDING)
    has_scale = reads_weight = follows_weight = True

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(info)
        return {**shapes, MAGNITUDE: shapes[B][:1]}

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        plain, values = super().start(info, weight), weight()
        a, b = (plain[leaf].to(values.device).flatten(1) for leaf in (A, B))
        norms = norms_of_weight(detached(values), a, b, info.scaling, transposed=info.is_transposed)
        return {**plain, MAGNITUDE: norms}

    def effective_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        a, b = stored[A], stored[B]
        if weight is None:
            return EffectiveFactors(a, b)
        norms = output_norms(weight.detach(), a.detach().flatten(1), b.detach().flatten(1), scaling)
        return EffectiveFactors(a, b, _scale(stored, norms))

    def blocks(self, stored: Stored, info: LayerInfo, read: Reader) -> list[LowRankBlock]:
        a, b = (stored[leaf].detach().flatten(1) for leaf in (A, B))
        parts = (Window(part, slice(first, first + len(part)), low_rank.EVERYTHING) for first, part in read())
        squares = squares_of_windows(parts, a, b, info.scaling, transposed=info.is_transposed)
        return _blocks(stored, info, squares.sqrt())

    def live_blocks(self, stored: Stored, info: LayerInfo, weight: torch.Tensor, read: Reader) -> list[LowRankBlock]:
        a, b = (stored[leaf].flatten(1) for leaf in (A, B))
        norms = norms_of_weight(detached(weight), a, b, info.scaling, transposed=info.is_transposed)
        return _blocks(stored, info, norms)

    def options(self) -> dict[str, Any]:
        return {"use_dora": True}

    def to_peft(self, stored: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Return the tensors with PEFT's shapes: a convolution's magnitudes are (1, out, 1...)."""
        kernel, magnitude = stored[A].dim() - 2, stored[MAGNITUDE]
        return {**stored, MAGNITUDE: magnitude.view(1, -1, *[1] * kernel) if kernel else magnitude}

    def from_peft(self, found: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        magnitude = found[MAGNITUDE]
        if magnitude.dim() < 3 or magnitude.numel() != magnitude.shape[1]:
            return dict(found)  # unchanged; a wrong shape is reported later
        return {**found, MAGNITUDE: magnitude.flatten()}

    @property
    def option(self) -> str:
        return "use_dora"


def _scale(stored: Stored, norms: torch.Tensor) -> torch.Tensor:
    """Return c = m / norm(V), differentiable in m. norm(V) is rounded as m was at its start."""
    magnitude = stored[MAGNITUDE]
    return magnitude / norms.to(magnitude)


def _blocks(stored: Stored, info: LayerInfo, norms: torch.Tensor) -> list[LowRankBlock]:
    blocks = info.low_rank_blocks(stored[A], stored[B])
    return scaled_blocks(blocks, _scale(stored, norms), transposed=info.is_transposed)
