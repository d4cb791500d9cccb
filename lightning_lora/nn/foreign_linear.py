"""Linear layers of other libraries, whatever their weights are: GPTQ, AWQ, HQQ, Transformer Engine.

Which modules are such layers, which of their tensors are the base's, and how they are adapted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..distributed.sharding import copy_
from ..errors import LoRAError
from ..names import A, B, names_factor
from .adapted_module import AdaptedModule
from .attached_factors import Packed
from .linear import LoRALinear
from .low_rank import MERGEABLE_DTYPES
from .transforms import is_tracing
from .variant import Variant


class LoRAForeignLinear(LoRALinear):
    """A module that is no nn.Linear, and has in_features and out_features: y = its own forward(x) + s * B A dropout(x).

    Nothing reads its weight, so it is never merged.
    """

    KNOWN_FORWARD = ()  # any forward counts as that of a linear layer

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_foreign_linear(module)

    @classmethod
    def takes(cls, variant: Variant) -> bool:
        """Return whether a variant is plain LoRA in what it stores: others scale W, or PEFT lacks them here."""
        plain = variant.leaves in ((A, B), ())  # nothing is stored where attached adapters act alone
        return plain and not variant.has_scale

    @property
    def weight_leaf(self) -> str:
        return ""  # no parameter is adapted

    def adapted_weight(self) -> nn.Parameter:
        """Return a tensor that tells device and sharding, in place of a weight: A, or any tensor before A is there."""
        own = (self._parameters.get(A), *self.parameters(), *self.buffers())
        return cast(nn.Parameter, next((each for each in own if each is not None), torch.empty(0)))

    def weight_shape(self) -> torch.Size:
        return torch.Size((cast(int, self.out_features), cast(int, self.in_features)))

    def weight_dtype(self) -> torch.dtype:
        own = (each.dtype for each in (*self.parameters(), *self.buffers()))
        return next((dtype for dtype in own if dtype in MERGEABLE_DTYPES), torch.get_default_dtype())

    def base_values(self) -> torch.Tensor:
        """Return NaN: the values are not known."""
        return torch.full((1,), torch.nan)

    def why_not_merge(self) -> str:
        return f"it is a {self.lora_base.__name__}, whose weight only its own forward reads"

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward.

        Raises:
            LoRAError: it does not map (..., in) to (..., out), or lets no gradient through in training.
        """
        y = super().base_forward(*args, **kwargs)
        if is_tracing():  # which would keep sizes
            return y
        x = args[0]
        outputs, inputs = self.weight_shape()
        found = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        if x.shape[-1] != inputs or found != (*x.shape[:-1], outputs):
            raise LoRAError(
                f"{self.lora.name!r}: the {self.lora_base.__name__} maps {tuple(x.shape)} to {found}, and an adapter "
                f"needs a layer that maps (..., {inputs}) to (..., {outputs}); leave it out with "
                f"exclude_modules=[{self.lora.name!r}]."
            )
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled() and self.in_training():
            raise LoRAError(
                f"{self.lora.name!r}: the {self.lora_base.__name__} gives its input no gradient, so that layers before "
                "it would be trained wrongly. Call model.train() if the layer has a backward in training mode alone, "
                "as AutoAWQ's has, or choose another kernel of its library."
            )
        return y

    def with_attached(self, y: torch.Tensor, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return the sum in new memory: the layer may have returned its input, or keep y for its backward."""
        product = self.low_rank_product(x, *packed.factors_like(x, self.KIND, self.adapted_weight()))
        return y + product.to(y.dtype)

    def sum_forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = self.base_forward(x)
        dropped, scaling = self.dropped(x)
        return cast(torch.Tensor, y + self.low_rank_product(dropped, a, b * scaling).to(y.dtype))

    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise LoRAError(
            f"{self.lora.name!r}: a {self.lora_base.__name__} is adapted as a layer of one input, but was called with "
            f"{len(args) + len(kwargs)}; leave it out with exclude_modules=[{self.lora.name!r}]."
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's class writes, and the adapter, which a class like HQQLinear leaves out."""
        state = super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination")
        for leaf, tensor in self.stored().items():
            value = tensor if kwargs.get("keep_vars") else tensor.detach()
            (state if destination is None else destination).setdefault(kwargs.get("prefix", "") + leaf, value)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for leaf, tensor in self.stored().items():  # a class like HQQLinear ignores what it does not write
            value = state_dict.get(prefix + leaf)
            if value is not None and value is not tensor and value.shape == tensor.shape:
                copy_(tensor, value)


def is_foreign_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of another library: no nn.Linear, with in_features and out_features.

    Example::

        >>> is_foreign_linear(nn.Linear(2, 3))
        False
    """
    # hasattr(module, ...) takes several times longer, and is asked of every module.
    if isinstance(module, nn.Linear) or not ("in_features" in vars(module) or hasattr(type(module), "in_features")):
        return False
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(type(size) is int and size > 0 for size in sizes)


def is_of_base(module: nn.Module) -> bool:
    """Return whether a module's buffers and foreign entries belong to the base, so that no adapter file has them.

    True for a foreign linear layer that is adapted, or whose weight is not among its parameters: its weight is then in
    these buffers or entries. The buffers of other modules may be what training changes. False for a layer that shows no
    tensor at all.
    """
    if not is_foreign_linear(module):
        return False
    own = {name: tensor for name, tensor in module.named_parameters() if not names_factor(name)}
    is_weight = (tensor.is_floating_point() and tensor.dim() > 1 for tensor in own.values())
    shows_something = bool(own) or next(module.buffers(), None) is not None
    return shows_something and (isinstance(module, AdaptedModule) or not any(is_weight))


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is a foreign linear layer with integers, as packed weights are."""
    tensors = (*module._parameters.values(), *module._buffers.values()) if is_of_base(module) else ()
    return any(tensor is not None and not tensor.is_floating_point() for tensor in tensors)
