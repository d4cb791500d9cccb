"""LoHa (arXiv:2108.06098): the elementwise product of two low-rank products is added to the weight.

    W' = W + s * (w1_a @ w1_b) * (w2_a @ w2_b)

The rank of the sum is up to r * r. As one product B' @ A', each row of A' is a row of w1_b times a row of w2_b, and
each column of B' is a column of w1_a times a column of w2_a. A convolution's weight is viewed as a matrix
(out, in * kernel). w2_b starts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import LoRAConfig
from .low_rank import CONV, GROUPED_CONV, LINEAR
from .random_stream import stream
from .variant import EffectiveFactors, LayerInfo, Stored, Variant, Weight

FIRST_A, FIRST_B = "lora_hada_w1_a", "lora_hada_w1_b"  # (out, r) and (r, in)
SECOND_A, SECOND_B = "lora_hada_w2_a", "lora_hada_w2_b"  # (out, r) and (r, in)
LEAVES = (FIRST_A, FIRST_B, SECOND_A, SECOND_B)

WITHOUT = ("use_rslora", "enable_lora", "target_parameters", "trainable_token_indices")  # conflicting options
IN_PEFT = {"lora_alpha": "alpha", "init_lora_weights": "init_weights"}  # PEFT's names of options, by ours
FIELDS = (  # options with the same name in PEFT
    *("r", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "inference_mode"),
    *("task_type", "base_model_name_or_path", "revision"),
)
NOT_APPLIED = {"rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}  # the only accepted values


class LoHa(Variant):
    """Two pairs of factors, whose products are multiplied element by element."""

    name, title = "loha", "LoHa"
    trained = LEAVES
    peft_type = "LOHA"
    peft_attention = False
    peft_fields, peft_names = FIELDS, IN_PEFT
    peft_leaves: ClassVar[Mapping[str, str]] = {leaf.removeprefix("lora_"): leaf for leaf in LEAVES}

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        outputs, inputs = info.matrix_shape()
        pair = (outputs, info.rank), (info.rank, inputs)
        return dict(zip(LEAVES, pair + pair, strict=True))

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        draw = stream(info.seed)
        shapes = self.shapes(info)
        start = {leaf: torch.zeros(shapes[leaf], dtype=torch.float32, device="cpu") for leaf in LEAVES}
        for leaf, value in start.items():
            if leaf != SECOND_B or info.init is False:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
        return start

    def is_initial(self, stored: Stored, info: LayerInfo) -> bool:
        if info.init is False:
            return False
        return not stored[SECOND_B].is_meta and not bool(stored[SECOND_B].any())

    def effective_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        first_a, first_b, second_a, second_b = (stored[leaf] for leaf in LEAVES)
        a = (first_b[:, None, :] * second_b[None, :, :]).flatten(0, 1)
        return EffectiveFactors(a, (first_a[:, :, None] * second_a[:, None, :]).flatten(1))

    # --- what it goes with ---

    def why_not_with(self, config: LoRAConfig) -> str:
        for option in WITHOUT:
            if getattr(config, option):
                return f"{option} must be left out with {self.option}"
        if config.lora_dropout:
            return f"lora_dropout must be 0 with {self.option}, which has none in PEFT"
        if config.bias != "none":
            return f"bias must be 'none' with {self.option}, which has none in PEFT"
        if not isinstance(config.init_lora_weights, bool):
            return f"init_lora_weights must be true or false with {self.option}"
        return ""

    def why_not_on(self, module: nn.Module, kind: str, config: LoRAConfig) -> str:
        if kind in (LINEAR, CONV, GROUPED_CONV) and not isinstance(module, nn.Conv3d):
            return ""
        return f"{self.option} is for linear layers, nn.Conv1d and nn.Conv2d alone, as in PEFT"

    # --- apart from a model ---

    def rank(self, stored: Stored) -> int:
        return stored[FIRST_A].shape[1]

    # --- in PEFT ---

    def options_to_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().options_to_peft(options), **NOT_APPLIED}

    def options_from_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(options)
        for name in NOT_APPLIED:
            if found.pop(name, None):
                raise ValueError(f"{name}={options[name]!r} cannot be applied to {self.title} adapters")
        return super().options_from_peft(found)
