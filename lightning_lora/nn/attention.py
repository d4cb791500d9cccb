"""nn.MultiheadAttention: its adapted input projection, and its reading of an adapted out_proj."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn

from . import low_rank
from .lora_layer import LoRALayer, Swapped, swapped_class
from .low_rank import IN_PROJ, SEPARATE


class LoRAMultiheadAttention(LoRALayer):
    """nn.MultiheadAttention's in_proj: W (3E, E), A (r, E), B (3E, r); its out_proj is adapted as another layer.

    With kdim or vdim there are three weights; A then holds the A of each, side by side: (r, E + kdim + vdim). Enabled
    parts are q, k and v. It always runs on W + delta.
    """

    KIND = low_rank.ATTENTION

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        if cast(nn.MultiheadAttention, self)._qkv_same_embed_dim:
            return {IN_PROJ: getattr(self, IN_PROJ)}
        enabled = self.lora.spec.enabled or (True, True, True)
        return {name: getattr(self, name) for name, adapted in zip(SEPARATE, enabled, strict=True) if adapted}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        with reading_dense_weight(cast(nn.MultiheadAttention, self).out_proj):
            return self.dense_forward(*args, **kwargs)


def reading_dense_weight(layer: nn.Module) -> AbstractContextManager[None]:
    """Let W + delta stand in inside, where an adapter is active: for code that reads a layer's weight."""
    return layer.dense_weight() if isinstance(layer, LoRALayer) and layer.lora_active else nullcontext()


class LoRAReader(Swapped):
    """nn.MultiheadAttention of which out_proj alone is adapted: it reads that layer's weight instead of calling it."""

    out_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with reading_dense_weight(self.out_proj):
            return super().forward(*args, **kwargs)


def patch_attention(model: nn.Module) -> None:
    """Let every MultiheadAttention with an adapted out_proj run on that layer's W + delta, and no other. In place."""
    for module in model.modules():
        reads = isinstance(getattr(module, "out_proj", None), LoRALayer)
        if isinstance(module, nn.MultiheadAttention) and reads and not isinstance(module, Swapped):
            module.__class__ = swapped_class(LoRAReader, type(module))  # type: ignore[assignment]
        elif isinstance(module, LoRAReader) and not reads:
            module.__class__ = module.lora_base  # type: ignore[assignment]
