"""Adapted convolutions: nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from . import low_rank
from .lora_layer import LoRALayer
from .variant import EffectiveFactors


class LoRAConv(LoRALayer):
    """nn.Conv1d/2d/3d: weight (Cout, Cin/groups, k...), A (r, Cin/groups, k...), B (Cout, r, 1...).

    If convolving with A costs as much as with W (r * groups >= Cout, as in depthwise layers), it runs on W'.
    """

    KIND = low_rank.CONV
    MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    KNOWN_FORWARD = ("forward", "_conv_forward")

    def kind(self) -> str:
        return low_rank.GROUPED_CONV if cast(nn.Conv2d, self).groups > 1 else low_rank.CONV

    def runs_on_factors(self, x: torch.Tensor) -> bool:
        """Dropout of single elements of the input needs the factors, whatever they cost."""
        layer, spec, packed = cast(nn.Conv2d, self), self.lora.spec, self.lora.attached
        rank = 0 if packed is None else packed.rank
        if self.lora.strength:
            with torch.no_grad():
                rank += spec.variant.effective_factors(self.stored(), None, spec.scaling)[1].shape[1]
        costs_less = rank * layer.groups < layer.out_channels
        return super().runs_on_factors(x) and (costs_less or self.drops())

    def effective_factors(self) -> EffectiveFactors:
        return self.layer_info().shaped(super().effective_factors())

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        layer, a = cast(nn.Conv2d, self), a.to(x.dtype)
        if layer.groups > 1:  # each group of inputs is convolved with all of A, and then with its own rows of B
            a = a.repeat(layer.groups, *[1] * (a.dim() - 1))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[b.dim() - 3]
        return convolve(layer._conv_forward(x, a, None), b.to(x.dtype), groups=layer.groups)
