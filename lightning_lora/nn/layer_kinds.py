"""Which class adapts which module; a new kind of layer is a class and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from .attention import LoRAMultiheadAttention
from .conv import LoRAConv
from .dora import DoRALayer
from .embedding import LoRAEmbedding
from .linear import LoRAConv1D, LoRALinear, LoRAQuantisedLinear
from .lora_layer import LayerSpec, LayerState, LoRALayer, swapped_class
from .quantised import quantised_parameters

CLASSES: dict[type[nn.Module] | tuple[type[nn.Module], ...], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): LoRAConv,
    nn.MultiheadAttention: LoRAMultiheadAttention,
}


class DoRALinear(DoRALayer, LoRALinear):
    """nn.Linear."""


class DoRAConv1D(DoRALayer, LoRAConv1D):
    """transformers' Conv1D."""


class DoRAConv(DoRALayer, LoRAConv):
    """nn.Conv1d/2d/3d: one magnitude for each output channel."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """nn.Embedding: one magnitude for each dimension, of its values over the vocabulary, as in PEFT."""


VARIANTS: dict[str, Mapping[type[LoRALayer], type[LoRALayer]]] = {  # by option: the class in place of the plain one
    "use_dora": {
        LoRALinear: DoRALinear,
        LoRAConv1D: DoRAConv1D,
        LoRAConv: DoRAConv,
        LoRAEmbedding: DoRAEmbedding,
    },
}

ADAPTABLE = "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention"  # for people

LIBRARIES = ("torch.nn.modules.", "transformers.pytorch_utils")  # whose forwards the factored ones stand in for


def layer_class(module: nn.Module, variant: str = "") -> type[LoRALayer] | None:
    """Return the class of a variant ("" for plain LoRA) that adapts a module, or None where there is none."""
    if isinstance(module, nn.Linear) and quantised_parameters(module):
        return _of_variant(LoRAQuantisedLinear, variant)
    matching = (adapting for classes, adapting in CLASSES.items() if isinstance(module, classes))
    plain = next(matching, LoRAConv1D if is_conv1d(module) else None)
    return plain and _of_variant(plain, variant)


def _of_variant(plain: type[LoRALayer], variant: str) -> type[LoRALayer] | None:
    return VARIANTS[variant].get(plain) if variant else plain


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
