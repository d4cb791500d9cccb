"""Variants that are none of the package's, and what forgets them after a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_lora import names
from lightning_lora.nn.variant import Acting, Variant


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

    def shapes(self: Variant, place: Any) -> dict[str, tuple[int, ...]]:
        a, b = place.factor_shapes()
        return {"lora_gated_a": a, "lora_gated_b": b, "lora_gated_g": (place.rank,)}

    def start(self: Variant, place: Any, weight: Any) -> dict[str, torch.Tensor]:
        shapes = self.shapes(place)
        return {leaf: (torch.zeros if leaf == "lora_gated_b" else torch.ones)(shape) for leaf, shape in shapes.items()}

    def acting(self: Variant, stored: Any, weight: torch.Tensor | None, scaling: float) -> Acting:
        return Acting(stored["lora_gated_g"][:, None] * stored["lora_gated_a"], stored["lora_gated_b"])

    own = {"name": "gated", "trained": ("lora_gated_a", "lora_gated_b", "lora_gated_g")}
    return type("Gated", (Variant,), own | {"shapes": shapes, "start": start, "acting": acting} | attributes)


def define_halved(**attributes: Any) -> type[Variant]:
    """A variant whose outputs are halved where their weights are longer than 0.5: a scale that depends on W."""

    def shapes(self: Variant, place: Any) -> dict[str, tuple[int, ...]]:
        a, b = place.factor_shapes()
        return {"lora_halved_a": a, "lora_halved_b": b}

    def acting(self: Variant, stored: Any, weight: torch.Tensor | None, scaling: float) -> Acting:
        a, b = stored["lora_halved_a"], stored["lora_halved_b"]
        scale = None if weight is None else torch.where(weight.norm(dim=1) > 0.5, 0.5, 1.0)
        return Acting(a, b, scale)

    own = {"name": "halved", "trained": ("lora_halved_a", "lora_halved_b"), "reads_weight": True}
    return type("Halved", (Variant,), own | {"shapes": shapes, "acting": acting} | attributes)
