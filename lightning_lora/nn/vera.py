"""VeRA (arXiv:2310.11454): one pair of random projections for all layers, and two trained vectors for each.

    W' = W + diag(b) @ B[:out] @ diag(d) @ A[:, :in]

A (r, widest in) and B (widest out, r) are drawn once, by a key, and stay. They travel with the adapter, because random
streams differ between versions of torch. b starts as zero, d as a small number. There is no lora_alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .low_rank import CONV1D, LINEAR
from .random_stream import stream
from .variant import Acting, Config, Place, Stored, Variant, Weights

KINDS = (LINEAR, CONV1D)  # as PEFT
ROWS, DIAGONAL = "lora_vera_b", "lora_vera_d"  # b (out,) and d (r,)
SHARED_A, SHARED_B = "lora_vera_A", "lora_vera_B"
D_INITIAL, KEY = "d_initial", "projection_prng_key"  # as PEFT


class VeRA(Variant):
    """Trained vectors b and d of each layer, beside projections A and B that all layers share."""

    name, title = "vera", "VeRA"
    trained = (DIAGONAL, ROWS)
    shared = (SHARED_A, SHARED_B)
    scaled = False
    own_options = {D_INITIAL: 0.1, KEY: 0}

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {DIAGONAL: (place.rank,), ROWS: place.matrix_shape()[:1]}

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        shapes = self.shapes(place)
        return {DIAGONAL: torch.full(shapes[DIAGONAL], place.options[D_INITIAL]), ROWS: torch.zeros(shapes[ROWS])}

    def start_shared(self, places: Iterable[Place], seed: int) -> dict[str, torch.Tensor]:
        """Return A and B as PEFT draws them: Kaiming's uniform, one after the other from one stream."""
        first, *others = places
        sizes = [place.matrix_shape() for place in (first, *others)]
        outputs, inputs = (max(size) for size in zip(*sizes, strict=True))
        draw = stream(first.options[KEY])
        return {leaf: _uniform(shape, draw) for leaf, shape in ((SHARED_A, (first.rank, inputs)), (SHARED_B, (outputs, first.rank)))}

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        return not stored[ROWS].is_meta and not bool(stored[ROWS].any())

    def of_layer(self, stored: Stored, place: Place) -> Stored:
        outputs, inputs = place.matrix_shape()
        return {**stored, SHARED_A: stored[SHARED_A][:, :inputs], SHARED_B: stored[SHARED_B][:outputs]}

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        return Acting(stored[DIAGONAL][:, None] * stored[SHARED_A], stored[ROWS][:, None] * stored[SHARED_B])

    def conflict(self, config: Config) -> tuple[str, str] | None:
        for option in ("rank_pattern", "alpha_pattern", "use_rslora", "enable_lora", "target_parameters"):
            if getattr(config, option):
                return option, f"left out with {self.option}"
        if config.lora_alpha != type(config)().lora_alpha:
            return "lora_alpha", f"left out with {self.option}, which has no scaling"
        if config.init_lora_weights is not True:
            return "init_lora_weights", f"true with {self.option}"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        return "" if kind in KINDS else f"{self.option} is for linear layers and transformers' Conv1D alone, as in PEFT"


def _uniform(shape: tuple[int, int], draw: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=draw)
