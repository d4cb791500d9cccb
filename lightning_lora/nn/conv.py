"""Adapted convolutions: nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from . import low_rank
from .added_product import add_product
from .lora_layer import LoRALayer
from .low_rank_sum import runs_as_one
from .transforms import may_write
from .variant import Acting


class LoRAConv(LoRALayer):
    """nn.Conv1d/2d/3d: weight (Cout, Cin/groups, k...), A (r, Cin/groups, k...), B (Cout, r, 1...).

    If convolving with A costs as much as with W (r * groups >= Cout, as in depthwise layers), it runs on W + delta.
    """

    KIND = low_rank.CONV
    MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    KNOWN_FORWARD = ("forward", "_conv_forward")

    def kind(self) -> str:
        return low_rank.GROUPED_CONV if cast(nn.Conv2d, self).groups > 1 else low_rank.CONV

    def is_cheaper_dense(self) -> bool:
        """Return whether running on W + delta costs less. It cannot apply dropout to single elements of the input."""
        layer = cast(nn.Conv2d, self)
        rank = self.lora.spec.variant.acting_rank(self.lora.spec.r)
        return rank * layer.groups >= layer.out_channels and not self.drops()

    def acting(self) -> Acting:
        return self.place().shaped(super().acting())

    def sum_forward(self, input: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        base = self.base_forward(input)
        x, scaling = self.dropped(input)
        if cast(nn.Conv2d, self).groups > 1 or not runs_as_one(x, base):
            product = self.low_rank_product(x, a, b)
            add = torch.Tensor.add_ if may_write(base) else torch.add
            return add(base, product, alpha=scaling)
        return add_product(base, self._hidden(x, a), b, scaling, 1 - self.weight.dim())

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, cast(nn.Conv2d, self)._conv_forward(x, self.weight, None))

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[b.dim() - 3]
        return convolve(self._hidden(x, a), b.to(x.dtype), groups=cast(nn.Conv2d, self).groups)

    def _hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Return A(x). Every group of inputs is convolved with all of A, and later with its own rows of B."""
        layer, a = cast(nn.Conv2d, self), a.to(x.dtype)
        if layer.groups > 1:
            a = a.repeat(layer.groups, *[1] * (a.dim() - 1))
        return cast(torch.Tensor, layer._conv_forward(x, a, None))
