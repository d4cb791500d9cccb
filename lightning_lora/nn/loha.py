"""LoHa (arXiv:2108.06098): what is added is the elementwise product of two products of low rank.

    W' = W + s * (w1_a @ w1_b) * (w2_a @ w2_b)

Its rank is up to r * r: the product of A' = rows of w1_b times rows of w2_b, and B' = columns of w1_a times columns of
w2_a. A convolution's weight is seen as a matrix (out, in * kernel). w2_b starts as zero.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .low_rank import CONV, GROUPED_CONV, LINEAR
from .random_stream import stream
from .variant import Acting, Config, Place, Stored, Variant, Weights

FIRST_A, FIRST_B = "lora_hada_w1_a", "lora_hada_w1_b"  # (out, r) and (r, in)
SECOND_A, SECOND_B = "lora_hada_w2_a", "lora_hada_w2_b"  # the same


class LoHa(Variant):
    """Two pairs of factors, whose products are multiplied element by element."""

    name, title = "loha", "LoHa"
    trained = (FIRST_A, FIRST_B, SECOND_A, SECOND_B)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        outputs, inputs = place.matrix_shape()
        pair = (outputs, place.rank), (place.rank, inputs)
        return dict(zip(self.trained, pair + pair, strict=True))

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        draw = stream(place.seed)
        start = {leaf: torch.zeros(shape, dtype=torch.float32, device="cpu") for leaf, shape in self.shapes(place).items()}
        for leaf, value in start.items():
            if leaf != SECOND_B or place.init is False:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
        return start

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        if place.init is False:
            return None
        return not stored[SECOND_B].is_meta and not bool(stored[SECOND_B].any())

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        first_a, first_b, second_a, second_b = (stored[leaf] for leaf in self.trained)
        b = (first_a[:, :, None] * second_a[:, None, :]).flatten(1)
        a = (first_b[:, None, :] * second_b[None, :, :]).flatten(0, 1)
        return Acting(a, b)

    def conflict(self, config: Config) -> tuple[str, str] | None:
        for option in ("use_rslora", "enable_lora", "target_parameters"):
            if getattr(config, option):
                return option, f"left out with {self.option}"
        if config.lora_dropout:
            return "lora_dropout", f"0 with {self.option}, which has none in PEFT"
        if config.bias != "none":
            return "bias", f"'none' with {self.option}, which has none in PEFT"
        if not isinstance(config.init_lora_weights, bool):
            return "init_lora_weights", f"true or false with {self.option}"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        if kind in (LINEAR, CONV, GROUPED_CONV) and not isinstance(module, nn.Conv3d):
            return ""
        return f"{self.option} is for linear layers, nn.Conv1d and nn.Conv2d alone, as in PEFT"
