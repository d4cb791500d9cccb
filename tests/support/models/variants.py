"""Variants that are none of the package's, and what forgets them after a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_lora import names
from lightning_lora.nn.variant import EffectiveFactors, Variant


@contextmanager
def variants_forgotten() -> Iterator[None]:
    """What is registered inside is not known any more outside."""
    variants, leaves = dict(names.KNOWN_VARIANTS), set(names.LEAVES)
    try:
        yield
    finally:
        names.KNOWN_VARIANTS.clear()
        names.KNOWN_VARIANTS.update(variants)
        names.LEAVES.intersection_update(leaves)


def define_gated(**attributes: Any) -> type[Variant]:
    """A variant of which a vector scales the ranks: s * B @ diag(g) @ A."""

    def shapes(self: Variant, info: Any) -> dict[str, tuple[int, ...]]:
        a, b = info.factor_shapes()
        return {"lora_gated_a": a, "lora_gated_b": b, "lora_gated_g": (info.rank,)}

    def start(self: Variant, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        shapes = self.shapes(info)
        return {leaf: (torch.zeros if leaf == "lora_gated_b" else torch.ones)(shape) for leaf, shape in shapes.items()}

    def effective_factors(self: Variant, stored: Any, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        return EffectiveFactors(stored["lora_gated_g"][:, None] * stored["lora_gated_a"], stored["lora_gated_b"])

    own = {"name": "gated", "trained": ("lora_gated_a", "lora_gated_b", "lora_gated_g")}
    return type(
        "Gated",
        (Variant,),
        own | {"shapes": shapes, "start": start, "effective_factors": effective_factors} | attributes,
    )


def define_halved(**attributes: Any) -> type[Variant]:
    """A variant whose outputs are halved where their weights are longer than 0.5: a scale that depends on W."""

    def shapes(self: Variant, info: Any) -> dict[str, tuple[int, ...]]:
        a, b = info.factor_shapes()
        return {"lora_halved_a": a, "lora_halved_b": b}

    def effective_factors(self: Variant, stored: Any, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        a, b = stored["lora_halved_a"], stored["lora_halved_b"]
        scale = None if weight is None else torch.where(weight.norm(dim=1) > 0.5, 0.5, 1.0)
        return EffectiveFactors(a, b, scale)

    reads = {"has_scale": True, "reads_weight": True}
    own = {"name": "halved", "trained": ("lora_halved_a", "lora_halved_b"), **reads}
    return type("Halved", (Variant,), own | {"shapes": shapes, "effective_factors": effective_factors} | attributes)
