"""What each adapted layer is, as a word that travels with its factors: shapes alone cannot tell W from its transpose.

With the word and the weights' shapes, a stand-in says how the factors map to the weight where there is no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from .base import LoRALayer
from .layers import LoRAConv, LoRAConv1D, LoRAEmbedding, LoRALinear, LoRAMultiheadAttention
from .merge import adapted_layers

KINDS: dict[str, type[LoRALayer]] = {
    "Linear": LoRALinear,
    "Conv1D": LoRAConv1D,
    "Embedding": LoRAEmbedding,
    "Conv": LoRAConv,
    "GroupedConv": LoRAConv,
    "MultiheadAttention": LoRAMultiheadAttention,
    "AttentionOutput": LoRALinear,
}
IN_PROJ, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of each adapted layer of a model."""
    outputs = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {name: _kind(layer, id(layer) in outputs) for name, layer in adapted_layers(model).items()}


def _kind(layer: LoRALayer, is_attention_output: bool) -> str:
    if is_attention_output:
        return "AttentionOutput"
    if isinstance(layer, LoRAConv) and cast(nn.Conv2d, layer).groups > 1:
        return "GroupedConv"
    return layer.lora_mixin.__name__.removeprefix("LoRA")


def stand_in(kind: str, shapes: Mapping[str, Sequence[int]], rank: int, enabled: tuple[bool, ...] | None) -> LoRALayer:
    """A layer without values that answers factor_shapes() and pieces() as a real one does.

    Args:
        kind: one of KINDS.
        shapes: of the layer's weights, by their own names.
        rank: r.
        enabled: which parts of a fused projection are adapted.
    """
    layer = KINDS[kind]()
    for name, shape in shapes.items():
        weight = nn.Parameter(torch.empty(tuple(shape), device="meta"), requires_grad=False)
        layer.register_parameter(name, weight)
    layer.lora_r, layer.lora_enabled = rank, enabled
    if isinstance(layer, LoRAMultiheadAttention):
        attention = cast(nn.MultiheadAttention, layer)
        attention._qkv_same_embed_dim = IN_PROJ in shapes
        attention.embed_dim = next(iter(shapes.values()))[0] // (3 if IN_PROJ in shapes else 1)
    return layer
