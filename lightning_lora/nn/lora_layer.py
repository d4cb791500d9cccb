"""An adapted layer and its forward. Each kind of layer has a subclass, which is mixed in front of the layer's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded
from ..errors import LoRAError
from ..names import names_factor
from . import low_rank
from .adapted_module import AdaptedModule, StandIns
from .adapted_weights import AdaptedWeights
from .attached_factors import Packed
from .transforms import runs_by_formula
from .variant import Variant

DROPOUT_STEPS = 2**16

LAYER_CLASSES: list[
    type[LoRALayer]
] = []  # one class for each kind of layer; a class adds itself when its file is imported


class LoRALayer(AdaptedWeights, AdaptedModule):
    """An adapted layer (arXiv:2106.09685).

    A kind of layer is a subclass. It defines KIND, MODULES or `adapts` to say which modules it adapts, and
    low_rank_product. It may define runs_on_factors, sum_forward, KNOWN_FORWARD, kind, effective_factors and
    over_outputs too.
    """

    MODULES: ClassVar[tuple[type[nn.Module], ...]] = ()  # the classes of layers of this kind
    KNOWN_FORWARD: ClassVar[tuple[str, ...]] = ("forward",)  # methods of the layer that factored_forward replaces
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("lora", "lora_active")
    weight: nn.Parameter

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not vars(cls).keys().isdisjoint(("MODULES", "adapts")):
            LAYER_CLASSES.append(cls)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        return isinstance(module, cls.MODULES)

    @classmethod
    def takes(cls, variant: Variant) -> bool:
        """Return whether layers of this kind can be adapted with a variant."""
        return cls.KIND in variant.kinds

    @property
    def lora_holder(self) -> nn.Module:
        return self

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        return {"": self}

    @property
    def weight_leaf(self) -> str:
        return "weight"

    def adapted_weight(self) -> nn.Parameter:
        weight = self._parameters.get("weight")  # nn.Module.__getattr__ is several times slower
        return self.weight if weight is None else weight

    def stored(self, leaves: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        parameters, leaves = self._parameters, leaves or self.lora.spec.variant.leaves
        # Looked up by [], which DeepSpeed's own dictionary notices: then it gathers them for another module's forward.
        found = {leaf: tensor for leaf in leaves if leaf in parameters and (tensor := parameters[leaf]) is not None}
        return found if len(found) == len(leaves) else super().stored(leaves)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            self.check_strengths()
            return super().forward(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not self.runs_on_factors(inputs[0]):
            return self.dense_forward(*args, **kwargs)
        self.record_segment()
        return self.factored_forward(inputs[0])

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the layer had before it was adapted, without the adapter."""
        return super().forward(*args, **kwargs)

    def runs_on_factors(self, x: torch.Tensor) -> bool:
        """Return whether factored_forward is right for this input, and costs less than dense_forward.

        Nested tensors have no operator that scales outputs.
        """
        return not (self.lora.custom_forward or (self.lora.spec.variant.has_scale and x.is_nested))

    def factored_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y = c * (W x + s * B(A(dropout(x)))) + bias without building B @ A, plus the attached adapters.

        Most variants have no scale c.
        """
        if self.lora.strength:
            a, b, scale = self.effective_factors()
            y = self.sum_forward(x, a, b)
            y = y if scale is None else self.scaled(y, scale)
        else:
            y = cast(torch.Tensor, self.base_forward(x))
        return y if self.lora.attached is None else self.with_attached(y, x, self.lora.attached)

    def sum_forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return y = W x + bias + s * B(A(dropout(x)))."""
        y = cast(torch.Tensor, self.base_forward(x))
        dropped, scaling = self.dropped(x)
        product = self.low_rank_product(dropped, a, b * scaling)  # B is smaller than the product
        return y + product if runs_by_formula(y) else y.add_(product)

    def with_attached(self, y: torch.Tensor, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return y with the sum of w_i * s_i * B_i(A_i(x)) added to it. In place, where that may be."""
        product = self.low_rank_product(x, *packed.factors_like(x, self.KIND, self.adapted_weight()))
        return y + product if runs_by_formula(y) else y.add_(product)

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B(A(x)) in the dtype of the outputs; A and B may have another."""
        raise NotImplementedError

    def scaled(self, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return c * (y - bias) + bias. Where c is 1, no bit of y changes."""
        c, bias = self.over_outputs(scale), getattr(self, "bias", None)
        if y.dtype == c.dtype:
            return y * c if bias is None else torch.lerp(self.over_outputs(bias), y, c)
        change = (c - 1).to(y.dtype)  # 16 bits would round c, which is near 1
        return y + change * (y if bias is None else y - self.over_outputs(bias).to(y.dtype))

    def over_outputs(self, values: torch.Tensor) -> torch.Tensor:
        """Return values (out,) in the shape that broadcasts with the layer's outputs."""
        return values.view(-1, *[1] * (self.weight.dim() - 2))

    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run base_forward on W', differentiable in the trained tensors.

        Dropout drops whole input features, the same ones for the whole batch, because W' is built without the input.
        """
        with self.on_dense_weight():
            return super().forward(*args, **kwargs)

    def on_dense_weight(self) -> StandIns:
        """Return a context manager in which W' stands in for each adapted weight; one thread at a time enters it."""
        return StandIns(self, [self])

    def dropped(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the adapter's input after dropout, and the scaling that its product needs then."""
        spec = self.lora.spec
        x, factor = drop(x, spec.dropout) if self.drops() else (x, 1.0)
        return x, self.scaling * factor

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter. A stored tensor that parallelize_module has sharded is placed like the weight first.

        Raises:
            LoRAError: the variant or enable_lora cannot follow a tensor parallel split.
        """
        if names_factor(name) and is_sharded(param):
            from ..distributed.tensor_parallel import place_like_weight  # imported here: slow to import, rarely needed

            variant = self.lora.spec.variant
            if self.lora.spec.enabled is not None:
                raise LoRAError(
                    f"{type(self).__name__}: the parts of enable_lora do not follow a tensor parallel split; adapt the "
                    "layer as a whole, or leave it out of the parallelize plan."
                )
            if name not in variant.split_like:
                raise LoRAError(
                    f"{type(self).__name__}: {variant.option} does not follow a tensor parallel split; leave the layer "
                    "out of target_modules, or out of the parallelize plan."
                )
            dims = low_rank.shard_dims(self.KIND)
            param = place_like_weight(variant.split_like[name], cast(nn.Parameter, param), self.adapted_weight(), dims)
        super().register_parameter(name, param)


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Zero each element of x with probability p. Return the result and the factor that restores its expectation.

    On the CPU, torch's own dropout takes many times as long as the adapter's products. Here 16 random bits decide about
    each element. p is rounded to a multiple of 1/65536, and the factor is computed from the rounded p, so the
    expectation is exact.
    """
    if not x.is_cpu or runs_by_formula(x):
        return F.dropout(x, p), 1.0
    steps = min(max(round(p * DROPOUT_STEPS), 1), DROPOUT_STEPS - 1)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64, device=x.device)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(bits < steps - DROPOUT_STEPS // 2, 0), DROPOUT_STEPS / (DROPOUT_STEPS - steps)
