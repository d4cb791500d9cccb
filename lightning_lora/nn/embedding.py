"""Adapted nn.Embedding."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from . import low_rank
from .lora_layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """nn.Embedding: y = W[x] + s * B A[:, x], with W (num, dim), A (r, num), B (dim, r).

    There is no dropout, as in PEFT and loralib. torch scales gradients by frequency if the layer runs on W'.
    """

    KIND = low_rank.EMBEDDING
    MODULES = (nn.Embedding,)
    LOOKUP = True

    def runs_on_factors(self, x: torch.Tensor) -> bool:
        return super().runs_on_factors(x) and not cast(nn.Embedding, self).scale_grad_by_freq

    def drops(self) -> bool:
        return False

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        return _summed(super().base_forward(*args, **kwargs))

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = F.linear(_summed(F.embedding(x, a.T)).to(self.weight.dtype), b.to(self.weight.dtype))
        padding = cast(nn.Embedding, self).padding_idx
        if padding is None or not torch.is_grad_enabled():
            return product
        return torch.where((x == padding).unsqueeze(-1), product.detach(), product)  # no gradient, as in nn.Embedding


def _summed(rows: torch.Tensor) -> torch.Tensor:
    """Return looked-up rows. A table that is split by rows over ranks gives partial sums, which are summed here."""
    if not is_sharded(rows):
        return rows
    from ..distributed.tensor_parallel import sum_partials  # imported here: it is slow to import and rarely needed

    return sum_partials(rows)
