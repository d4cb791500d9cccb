"""Modules of torch that read an adapted layer's weight instead of calling the layer.

nn.MultiheadAttention reads out_proj.weight: while the adapter is unmerged it is given W + delta. The fast path of
nn.TransformerEncoderLayer reads every weight in evaluation mode: it is turned off while an adapter inside is unmerged,
and turned on again when merged, where it reads W'.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from .base import LoRALayer
from .layers import reading_sum
from .swapped import Swapped, swapped_class

NESTED = "lora_use_nested_tensor"


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


def set_fast_paths_(model: nn.Module) -> None:
    """Allow the fast paths of torch's transformer layers just where no unmerged adapter is inside."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _block_layer(module, _has_active(module))
        elif isinstance(module, nn.TransformerEncoder):
            _block_nested_tensors(module, _has_active(module))


def _has_active(module: nn.Module) -> bool:
    return any(isinstance(layer, LoRALayer) and layer.lora_active for layer in module.modules())


def _block_layer(layer: nn.Module, block: bool) -> None:
    """A forward pre-hook is torch's documented way to keep a layer off its fast path."""
    hooks = [key for key, hook in layer._forward_pre_hooks.items() if hook is _keep_off_the_fast_path]
    if block and not hooks:
        layer.register_forward_pre_hook(_keep_off_the_fast_path)
    for key in [] if block else hooks:
        del layer._forward_pre_hooks[key]


def _keep_off_the_fast_path(module: nn.Module, args: Any) -> None:
    return None


def _block_nested_tensors(encoder: nn.TransformerEncoder, block: bool) -> None:
    """The slow path rejects nested tensors."""
    if block and NESTED not in vars(encoder):
        setattr(encoder, NESTED, encoder.use_nested_tensor)
        encoder.use_nested_tensor = False
    elif not block and NESTED in vars(encoder):
        encoder.use_nested_tensor = cast(bool, vars(encoder).pop(NESTED))
