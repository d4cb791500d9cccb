"""nn.Embedding."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from . import low_rank
from .lora_layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """nn.Embedding: weight (num, dim), A (r, num), B (dim, r), no dropout (as PEFT and loralib).

    With max_norm the base class renormalises W in place; here the layer stays factored and W as it is: the rows that
    are looked up are renormalised instead.
    """

    KIND = low_rank.EMBEDDING
    LOOKUP = True

    def unmergeable_reason(self) -> str:
        reason = "max_norm renormalises its rows in place" if self._renormalises() else ""
        return super().unmergeable_reason() or reason

    def _renormalises(self) -> bool:
        return cast(nn.Embedding, self).max_norm is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.lora_active or self.weight.requires_grad or not self._renormalises():
            return super().forward(*args, **kwargs)
        if not self.lora.custom_forward:
            return self._renormalised(*args, **kwargs)
        with self.lora.lock:
            weight = self.weight
            try:
                self._parameters["weight"] = nn.Parameter(weight.detach().clone(), False)
                return super().forward(*args, **kwargs)
            finally:
                self._parameters["weight"] = weight

    def _renormalised(self, input: torch.Tensor) -> torch.Tensor:
        layer = cast(nn.Embedding, self)
        if self.weight.requires_grad:  # unfrozen by the user: trained as the base class does it
            return cast(torch.Tensor, self.base_forward(input))
        rows = self.weight.detach()[input]
        flat = rows.view(-1, rows.shape[-1])
        each = torch.arange(flat.shape[0], device=flat.device)
        torch.embedding_renorm_(flat, each, cast(float, layer.max_norm), layer.norm_type)
        return rows

    def factored_forward(self, input: torch.Tensor) -> torch.Tensor:
        base = self._renormalised(input) if self._renormalises() else self.base_forward(input)
        a, b = self.lora_A.to(base.dtype), self.lora_B.to(base.dtype)
        delta = F.linear(_summed(F.embedding(input, a.T)), b) * self.lora.spec.scaling
        delta = self._trained_as_rows(delta, input) if torch.is_grad_enabled() else delta
        return _summed(base).add_(delta)

    def _trained_as_rows(self, delta: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Let padding_idx and scale_grad_by_freq act on delta's gradient: they are about rows of the weight."""
        layer = cast(nn.Embedding, self)
        if layer.padding_idx is not None:
            delta = torch.where((input == layer.padding_idx).unsqueeze(-1), delta.detach(), delta)
        if layer.scale_grad_by_freq:
            occurs = torch.bincount(input.flatten(), minlength=layer.num_embeddings)[input].unsqueeze(-1)
            delta = delta.detach() + (delta - delta.detach()) / occurs.to(delta.dtype)
        return delta


def _summed(rows: torch.Tensor) -> torch.Tensor:
    """Rows that were looked up; of a table that is split by rows they come as partial sums of the ranks."""
    if not is_sharded(rows):
        return rows
    from ..distributed.tensor_parallel import sum_partials  # imports much, and is rarely needed

    return sum_partials(rows)
