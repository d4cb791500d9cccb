"""Adapted nn.MultiheadAttention: its input projection, and its reading of an adapted out_proj."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from .linear import LoRALinear
from .lora_layer import LoRALayer, Swapped, swapped_class
from .low_rank import Piece


class LoRAMultiheadAttention(LoRALinear):
    """nn.MultiheadAttention's in_proj: W (3E, E), A (r, E), B (3E, r); its out_proj is a layer of its own.

    With key and value widths of their own there are three weights; A then holds the A of each, side by side:
    (r, E + kdim + vdim). Enabled parts are q, k and v. It always runs on W + delta.
    """

    def _layer(self) -> nn.MultiheadAttention:
        return cast(nn.MultiheadAttention, self)

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        names = ("in_proj_weight",) if self._layer()._qkv_same_embed_dim else self._separate()
        return {name: getattr(self, name) for name in names}

    def _separate(self) -> list[str]:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        enabled = self.lora_enabled or (True, True, True)
        return [name for name, adapted in zip(names, enabled, strict=True) if adapted]

    def _features(self) -> tuple[int, int]:
        layer = self._layer()
        return 3 * layer.embed_dim, layer.embed_dim

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._layer()._qkv_same_embed_dim:
            return super().factor_shapes()
        inputs = [weight.shape[1] for weight in self.adapted_weights().values()]
        return (self.lora_r, sum(inputs)), (len(inputs) * self._layer().embed_dim, self.lora_r)

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        if self._layer()._qkv_same_embed_dim:
            return {"in_proj_weight": super().pieces(factor_a, factor_b)["weight"]}
        weights = self.adapted_weights()
        parts_a = torch.split(factor_a, [weight.shape[1] for weight in weights.values()], dim=1)
        parts_b = torch.split(factor_b, self._layer().embed_dim)
        return {name: [Piece(0, 0, b, a)] for name, a, b in zip(weights, parts_a, parts_b, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        with reading_sum(self._layer().out_proj):
            return self.forward_on_sum(*args, **kwargs)


def reading_sum(layer: nn.Module) -> AbstractContextManager[None]:
    """W + delta inside, where an adapter is active: for code that reads a layer's weight instead of calling it."""
    return layer.sum_as_weight() if isinstance(layer, LoRALayer) and layer.lora_active else nullcontext()


class LoRAReader(Swapped):
    """Mixed in front of nn.MultiheadAttention."""

    out_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.out_proj
        if not isinstance(layer, LoRALayer) or not layer.lora_active:
            return super().forward(*args, **kwargs)
        with reading_sum(layer):
            return super().forward(*args, **kwargs)


def swap_readers_(model: nn.Module) -> None:
    """Give every MultiheadAttention with an adapted out_proj the forward that applies it, and take it from others."""
    for module in model.modules():
        reads = isinstance(getattr(module, "out_proj", None), LoRALayer)
        if isinstance(module, nn.MultiheadAttention) and reads and not isinstance(module, Swapped):
            module.__class__ = swapped_class(LoRAReader, type(module))  # type: ignore[assignment]
        elif isinstance(module, LoRAReader) and not reads:
            module.__class__ = module.lora_base  # type: ignore[assignment]
