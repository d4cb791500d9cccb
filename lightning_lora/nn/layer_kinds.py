"""Which class adapts which module; a new kind of layer is a class and a line here."""

from __future__ import annotations

from typing import cast

from torch import nn

from .attention import LoRAMultiheadAttention
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .linear import LoRAConv1D, LoRALinear, LoRAQuantisedLinear
from .lora import LoRA
from .lora_layer import LayerSpec, LayerState, LoRALayer, adapted_layers, swapped_class
from .low_rank import ATTENTION_OUTPUT
from .quantised import quantised_parameters
from .variant import Variant

CLASSES: dict[type[nn.Module] | tuple[type[nn.Module], ...], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): LoRAConv,
    nn.MultiheadAttention: LoRAMultiheadAttention,
}


LORA = LoRA()

ADAPTABLE = "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention"  # for people

LIBRARIES = ("torch.nn.modules.", "transformers.pytorch_utils")  # whose forwards the factored ones stand in for


def layer_class(module: nn.Module, variant: Variant = LORA) -> type[LoRALayer] | None:
    """Return the class that adapts a module with a variant, or None where there is none."""
    if isinstance(module, nn.Linear) and quantised_parameters(module):
        return variant.layer_class(LoRAQuantisedLinear)
    matching = (adapting for classes, adapting in CLASSES.items() if isinstance(module, classes))
    plain = next(matching, LoRAConv1D if is_conv1d(module) else None)
    return plain and variant.layer_class(plain)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def adapt_(module: nn.Module, name: str, spec: LayerSpec, injection: object) -> LoRALayer:
    """Turn a supported module into an adapted layer, without its factors yet. In place."""
    adapting = cast(type[LoRALayer], layer_class(module, spec.variant))
    forwards = [getattr(type(module), method) for method in adapting.KNOWN_FORWARD]
    custom_forward = not all(forward.__module__.startswith(LIBRARIES) for forward in forwards)
    module.__class__ = swapped_class(adapting, type(module))
    layer = cast(LoRALayer, module)
    layer.lora = LayerState(spec, name, injection, custom_forward)
    layer.lora_active = True
    return layer


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Return the kind of each adapted layer of a model that has A and B, as files name it: one of low_rank.KINDS."""
    outputs = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return {
        name: ATTENTION_OUTPUT if id(layer) in outputs else layer.kind()
        for name, layer in adapted_layers(model).items()
        if layer.kind()
    }
