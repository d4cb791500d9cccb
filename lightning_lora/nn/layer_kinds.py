"""The kinds of layers, and how a module becomes an adapted layer of its kind."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

from torch import nn

from ..matching import ALL_LAYERS
from .adapted_module import swapped_class
from .adapted_weights import LayerSpec, LayerState, add_trained_adapter_
from .attention import LoRAMultiheadAttention
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .foreign_linear import LoRAForeignLinear
from .linear import LoRAConv1D, LoRALinear, LoRAQuantizedLinear
from .lora import LoRA
from .lora_layer import LAYER_CLASSES, LoRALayer
from .low_rank import KINDS
from .variant import Variant

LORA = LoRA()

LIBRARIES = ("torch.nn.modules.", "transformers.pytorch_utils")  # modules whose forwards factored_forward may replace


class LayerKind(NamedTuple):
    """A class that adapts modules.

    Attributes:
        adapting: the class.
        title: what users call the modules, for messages; "" for modules that another row names.
        adapted_by: the value of target_modules that adapts them: "all-linear", "all-layers", which adapts those of
            "all-linear" too, or "names" for neither. model/layers_by_kind.py has what it leaves out.
    """

    adapting: type[LoRALayer]
    title: str
    adapted_by: Literal["all-linear", "all-layers", "names"]


# In the order in which layer_class asks. No module is of two of these kinds; a user's own kinds are asked after them.
LAYER_KINDS = (
    LayerKind(LoRALinear, "nn.Linear", "all-linear"),
    LayerKind(LoRAQuantizedLinear, "", "all-linear"),
    LayerKind(LoRAConv1D, "transformers' Conv1D", "all-linear"),
    LayerKind(LoRAEmbedding, "nn.Embedding", "names"),
    LayerKind(LoRAConv, "nn.Conv1d/2d/3d", "all-layers"),
    LayerKind(LoRAMultiheadAttention, "nn.MultiheadAttention", "all-layers"),
    LayerKind(LoRAForeignLinear, "", "names"),
)
_in_table = [kind.adapting for kind in LAYER_KINDS]
for _cls in LAYER_CLASSES:
    if _cls not in _in_table:
        raise TypeError(f"{_cls.__name__} has no row in LAYER_KINDS.")
    if _cls.KIND not in KINDS:
        raise TypeError(f"{_cls.__name__} is of the kind {_cls.KIND!r}, which has no row in TABLE of low_rank.py.")
LAYER_CLASSES[:] = _in_table

_titles = [kind.title for kind in LAYER_KINDS if kind.title]
ADAPTABLE = f"{', '.join(_titles[:-1])} and {_titles[-1]}"  # for people
# Classes of modules that "all-layers" adapts and "all-linear" does not.
MORE_MODULES = tuple(cls for kind in LAYER_KINDS if kind.adapted_by == ALL_LAYERS for cls in kind.adapting.MODULES)


def layer_class(module: nn.Module, variant: Variant = LORA) -> type[LoRALayer] | None:
    """Return the class that adapts a module with a variant, or None if there is no such class."""
    found = next((kind for kind in LAYER_CLASSES if kind.adapts(module)), None)
    return found if found is not None and found.takes(variant) else None


def adapt_(module: nn.Module, name: str, spec: LayerSpec, injection: object) -> LoRALayer:
    """Turn a supported module into an adapted layer, if it is none yet. In place.

    Its stored tensors are created later.
    """
    if isinstance(module, LoRALayer):  # adapters are attached to it
        return cast(LoRALayer, add_trained_adapter_(module, spec))
    adapting = cast(type[LoRALayer], layer_class(module, spec.variant))
    # factored_forward may replace methods of the kind's own class and of these libraries. Any other forward may do more
    # than W x, so it runs on W'.
    custom_forward = False
    for method in adapting.KNOWN_FORWARD:
        owner = next(parent for parent in type(module).__mro__ if method in vars(parent))
        of_kind = owner in adapting.MODULES and adapting.low_rank_product is not LoRALayer.low_rank_product
        if not of_kind and not getattr(owner, method).__module__.startswith(LIBRARIES):
            custom_forward = True
    # Before the class, so that an exception between them leaves no layer that lacks them.
    vars(module).update(lora=LayerState(spec, name, injection, custom_forward), lora_active=True)
    module.__class__ = swapped_class(adapting, type(module))
    return cast(LoRALayer, module)
