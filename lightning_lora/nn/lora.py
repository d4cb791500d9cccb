"""LoRA (arXiv:2106.09685): W' = W + s * B @ A."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..names import A, B
from .init import WITHOUT_ZERO, initial_factors
from .variant import Acting, Config, Place, Stored, Variant, Weights


class LoRA(Variant):
    """A and B, whose product is added; one of the two starts as zero."""

    name, title = "lora", "LoRA"
    trained: ClassVar[tuple[str, ...]] = (A, B)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return dict(zip((A, B), place.factor_shapes(), strict=True))

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        a, b = initial_factors(*place.factor_shapes(), place.init, place.seed, lookup=place.is_lookup)
        return {A: a, B: b}

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        if place.init in WITHOUT_ZERO:
            return None
        factor = stored[A if place.is_lookup else B].detach()
        return factor.numel() > 0 and not factor.is_meta and not bool(factor.any())

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        return Acting(stored[A], stored[B])

    @property
    def option(self) -> str:
        return "LoRA"

    def conflict(self, config: Config) -> tuple[str, str] | None:
        return None
