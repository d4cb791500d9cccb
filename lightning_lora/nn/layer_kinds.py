"""Which class adapts which module. A new kind of layer is a class and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from .attention import LoRAMultiheadAttention
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .linear import LoRAConv1D, LoRALinear
from .lora_layer import LoRALayer, adapted_layers, swapped_class
from .low_rank import IN_PROJ

KINDS: dict[str, type[LoRALayer]] = {
    "Linear": LoRALinear,
    "Conv1D": LoRAConv1D,
    "Embedding": LoRAEmbedding,
    "Conv": LoRAConv,
    "GroupedConv": LoRAConv,
    "MultiheadAttention": LoRAMultiheadAttention,
    "AttentionOutput": LoRALinear,
}


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


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def layer_kind(module: nn.Module) -> type[LoRALayer] | None:
    """The mixin that adapts a module, or None where there is none."""
    if isinstance(module, nn.Linear):
        return LoRALinear
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return LoRAConv
    if isinstance(module, nn.MultiheadAttention):
        return LoRAMultiheadAttention
    return LoRAConv1D if is_conv1d(module) else None


def has_own_forward(module: nn.Module, mixin: type[LoRALayer]) -> bool:
    """Whether the class replaces the forward for which the factored shortcut is known."""
    known = ("torch.nn.modules.", "transformers.pytorch_utils")
    return any(not getattr(type(module), name).__module__.startswith(known) for name in mixin.KNOWN_FORWARD)


def adapt_(
    module: nn.Module,
    *,
    r: int,
    alpha: float,
    scaling: float,
    dropout: float,
    enabled: tuple[bool, ...] | None,
    wide: bool,
) -> LoRALayer:
    """Turn a supported module into an adapted layer, without its factors yet."""
    mixin = cast(type[LoRALayer], layer_kind(module))
    own_forward = has_own_forward(module, mixin)
    module.__class__ = swapped_class(mixin, type(module))
    layer = cast(LoRALayer, module)
    layer.lora_r, layer.lora_alpha, layer.lora_scaling, layer.lora_dropout = r, alpha, scaling, dropout
    layer.lora_dropping, layer.lora_wide = None, wide
    layer.lora_own_forward, layer.lora_enabled = own_forward, enabled
    layer.lora_active, layer.lora_merged, layer.lora_kept = True, False, {}
    layer.lora_damaged, layer.lora_tied, layer.lora_reported = False, "", False
    layer.lora_sharded = False
    return layer
