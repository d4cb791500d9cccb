"""Adapted nn.Embedding."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from . import low_rank
from .added_product import add_product
from .lora_layer import LoRALayer
from .low_rank_sum import runs_as_one
from .transforms import may_write


class LoRAEmbedding(LoRALayer):
    """nn.Embedding: weight (num, dim), A (r, num), B (dim, r), without dropout, as in PEFT and loralib.

    With max_norm, nn.Embedding renormalises rows of W in place. An adapted layer leaves W unchanged and renormalises
    copies of the rows that are looked up. Such a layer cannot be merged.
    """

    KIND = low_rank.EMBEDDING
    MODULES = (nn.Embedding,)
    LOOKUP = True
    max_norm: float | None

    def unmergeable_reason(self) -> str:
        reason = "max_norm renormalises its rows in place" if self.max_norm is not None else ""
        return super().unmergeable_reason() or reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.lora_active or self.weight.requires_grad or self.max_norm is None:
            return super().forward(*args, **kwargs)
        if not self.lora.custom_forward:
            return self._rows(*args, **kwargs)
        with self.lora.lock:
            weight = self.weight
            try:
                self._parameters["weight"] = nn.Parameter(weight.detach().clone(), False)
                return super().forward(*args, **kwargs)
            finally:
                self._parameters["weight"] = weight

    def _rows(self, input: torch.Tensor) -> torch.Tensor:
        """Look up rows of W. With max_norm, renormalise copies of them."""
        if self.max_norm is None or self.weight.requires_grad:  # a trained W is renormalised in place, as usual
            return cast(torch.Tensor, self.base_forward(input))
        rows = self.weight.detach()[input.contiguous()]  # else the rows may lie in the order of another layout
        flat = rows.view(-1, rows.shape[-1])
        indices = torch.arange(flat.shape[0], device=flat.device)
        torch.embedding_renorm_(flat, indices, self.max_norm, cast(nn.Embedding, self).norm_type)
        return rows

    def sum_forward(self, input: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        base, layer, scaling = _summed(self._rows(input)), cast(nn.Embedding, self), self.lora.spec.scaling
        hidden = _summed(F.embedding(input, a.T)).to(base.dtype)  # the table A may be much larger
        padding = self._padding(input) if torch.is_grad_enabled() else None
        if runs_as_one(hidden, base) and not layer.scale_grad_by_freq:
            return add_product(base, hidden, b, scaling, ignored=padding)
        delta = F.linear(hidden, (b * scaling).to(base.dtype))
        if padding is not None:
            delta = torch.where(padding, delta.detach(), delta)
        if layer.scale_grad_by_freq and torch.is_grad_enabled():
            delta = self._with_gradients_by_frequency(delta, input)
        return base.add_(delta) if may_write(base) else base + delta

    def _padding(self, input: torch.Tensor) -> torch.Tensor | None:
        """Return where the tokens of padding_idx are. As in nn.Embedding they give no gradient."""
        padding_idx = cast(nn.Embedding, self).padding_idx
        return None if padding_idx is None else torch.eq(input, padding_idx).unsqueeze(-1)

    def _with_gradients_by_frequency(self, delta: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Apply scale_grad_by_freq to delta's gradient, as nn.Embedding does to the rows of W."""
        rows = input.flatten()  # not torch.bincount, which torch 2.6 cannot compile
        counts = rows.new_zeros(cast(nn.Embedding, self).num_embeddings).index_add_(0, rows, torch.ones_like(rows))
        return delta.detach() + (delta - delta.detach()) / counts[input].unsqueeze(-1).to(delta.dtype)


def _summed(rows: torch.Tensor) -> torch.Tensor:
    """Return looked-up rows. A table that is split by rows over ranks gives partial sums, which are summed here."""
    if not is_sharded(rows):
        return rows
    from ..distributed.tensor_parallel import sum_partials  # imported here: it is slow to import and rarely needed

    return sum_partials(rows)
