"""nn.MultiheadAttention with an adapted input projection. With only out_proj adapted it is a reader (readers.py)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

from torch import nn

from . import low_rank
from .lora_layer import LoRALayer
from .low_rank import IN_PROJ, SEPARATE


class LoRAMultiheadAttention(LoRALayer):
    """nn.MultiheadAttention's in_proj: W (3E, E), A (r, E), B (3E, r). Its out_proj is adapted as a separate layer.

    With kdim or vdim there are three weights. A then holds their factors side by side: (r, E + kdim + vdim). The parts
    of enable_lora are q, k and v. The layer always runs on W + delta.
    """

    KIND = low_rank.ATTENTION
    MODULES = (nn.MultiheadAttention,)

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        if cast(nn.MultiheadAttention, self)._qkv_same_embed_dim:
            return {IN_PROJ: getattr(self, IN_PROJ)}
        enabled = self.lora.spec.enabled or (True, True, True)
        return {name: getattr(self, name) for name, adapted in zip(SEPARATE, enabled, strict=True) if adapted}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        out_proj: nn.Module = cast(nn.MultiheadAttention, self).out_proj
        with out_proj.dense_weight() if isinstance(out_proj, LoRALayer) and out_proj.lora_active else nullcontext():
            return self.dense_forward(*args, **kwargs)
