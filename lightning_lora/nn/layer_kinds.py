"""Find the class that adapts a module, and turn the module into an adapted layer."""

from __future__ import annotations

from typing import cast

from torch import nn

from .adapted_module import swapped_class
from .adapted_weights import LayerSpec, LayerState, add_trained
from .lora import LoRA
from .lora_layer import LAYER_CLASSES, LoRALayer
from .variant import Variant

LORA = LoRA()

ADAPTABLE = "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention"  # for people

LIBRARIES = ("torch.nn.modules.", "transformers.pytorch_utils")  # modules whose forwards factored_forward may replace


def layer_class(module: nn.Module, variant: Variant = LORA) -> type[LoRALayer] | None:
    """Return the class that adapts a module with a variant, or None if there is no such class."""
    found = next((kind for kind in LAYER_CLASSES if kind.adapts(module)), None)
    return found if found is not None and found.takes(variant) else None


def adapt_(module: nn.Module, name: str, spec: LayerSpec, injection: object) -> LoRALayer:
    """Turn a supported module into an adapted layer, if it is none yet. In place.

    Its stored tensors are created later.
    """
    if isinstance(module, LoRALayer):  # adapters are attached to it
        return cast(LoRALayer, add_trained(module, spec))
    adapting = cast(type[LoRALayer], layer_class(module, spec.variant))
    custom_forward = not all(_is_known(adapting, type(module), method) for method in adapting.KNOWN_FORWARD)
    # Before the class, so that an exception between them leaves no layer that lacks them.
    vars(module).update(lora=LayerState(spec, name, injection, custom_forward), lora_active=True)
    module.__class__ = swapped_class(adapting, type(module))
    return cast(LoRALayer, module)


def _is_known(adapting: type[LoRALayer], cls: type[nn.Module], method: str) -> bool:
    """Return whether factored_forward may replace a method: it is that of a kind's own class, or of a library."""
    if getattr(cls, method).__module__.startswith(LIBRARIES):
        return True
    owner = next(parent for parent in cls.__mro__ if method in vars(parent))
    return owner in adapting.MODULES and adapting.low_rank_product is not LoRALayer.low_rank_product
