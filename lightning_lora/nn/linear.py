"""Linear layers: nn.Linear, also with a quantized weight, transformers' Conv1D and fused projections."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded, local
from . import low_rank
from .adapted_weights import Blocks
from .attached_factors import Packed
from .lora_layer import LoRALayer
from .low_rank_sum import compute_dtype, fits, low_rank_sum
from .quantized import dequantize, dtype_of, quantized_as, quantized_parameters, refuse_bytes
from .transforms import runs_by_formula
from .variant import Variant


class LoRALinear(LoRALayer):
    """nn.Linear: y = W x + bias + s * B A dropout(x), with W (out, in), A (r, in), B (out, r).

    With n of m equal parts adapted, A is (n * r, in) and B is (n * out / m, r). A forward runs on the B (out, n * r)
    that equals them.
    """

    KIND = low_rank.LINEAR
    READS_VALUES: ClassVar[bool] = True  # whether a forward may compute W x itself, from the values of the weight

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not quantized_parameters(module)

    def sum_forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return y = W x + bias + s * B A dropout(x).

        LoRALayer.sum_forward has it as the formula is written. `_accumulated` and `_as_one` are faster ways to the same
        sum: on a CPU writing tensors takes the time, on a GPU launching kernels.
        """
        if self.lora.spec.enabled is not None:
            b = low_rank.to_block_diagonal(b, self.lora.spec.enabled)
        if x.dim() < 2 or runs_by_formula(x):
            return super().sum_forward(x, a, b)
        rows = x.flatten(0, -2)
        if not x.is_cpu and self.READS_VALUES and fits(rows, self.weight):  # looking up the weight takes long
            y = self._as_one(rows, a, b)
        else:
            y = self._accumulated(rows, a, b)
        # autograd must not see a view: fully_shard's hooks on the output would be lost if a view were changed in place.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    def with_attached(self, y: torch.Tensor, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Add the attached adapters' products to y: as the formula is written, or with no other tensor of y's size."""
        if x.dim() < 2 or runs_by_formula(x):
            return super().with_attached(y, x, packed)
        a, b = packed.factors(x.device)
        hidden = F.linear(x.flatten(0, -2), a.to(x.dtype))
        rows = y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, (len(hidden), y.shape[-1]))
        rows.addmm_(hidden.to(y.dtype), b.to(y.dtype).t())
        return rows if y.dim() == 2 else torch.ops.aten._unsafe_view(rows, y.shape)

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        if is_sharded(x):
            from ..distributed.tensor_parallel import low_rank_product  # imported here: slow to import, rarely needed

            product = low_rank_product(x, a, b)
            if product is not None:
                return product
        return F.linear(F.linear(x, a), b)

    def _accumulated(self, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Add the product in place to the base's output: one tensor of the output's size instead of three."""
        x, scaling = self.dropped(rows)
        hidden = torch.mm(a.to(x.dtype), x.t())
        # Computed after hidden, so that backward comes to it first. Its gradient of the input is no view, so autograd
        # adds the other gradient to it in place.
        y = cast(torch.Tensor, self.base_forward(rows))
        # Contiguous, so that autograd computes the gradient of B with the thin factor on the left.
        return y.addmm_(hidden.t().to(y.dtype), b.to(y.dtype).t().contiguous(), alpha=scaling)

    def _as_one(self, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Run as one operation of autograd, low_rank_sum.py, which launches fewer kernels."""
        rows = rows.to(compute_dtype(rows))
        x, scaling = self.dropped(rows)
        weight = low_rank.matrix_view(self.KIND, self.weight)
        return low_rank_sum(rows, x, weight, getattr(self, "bias", None), a, b, scaling)


class LoRAConv1D(LoRALinear):
    """transformers' Conv1D: a linear layer with the weight stored as (in, out). A and B are as for nn.Linear."""

    KIND = low_rank.CONV1D

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_conv1d(module)


class LoRAQuantizedLinear(LoRALinear):
    """A linear layer with a quantized weight: the forward of its own class, plus the factors' product.

    The weight is never written to, and the forward dequantizes no more than that class does.
    """

    READS_VALUES = False
    KNOWN_FORWARD = ()  # any forward counts as that of a linear layer, because W' would be a dequantized copy

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and bool(quantized_parameters(module))

    @classmethod
    def takes(cls, variant: Variant) -> bool:
        return super().takes(variant) and not variant.reads_weight

    def quantized(self) -> str:
        weight = quantized_parameters(self).get("weight", self.weight)
        refuse_bytes(weight, self.lora.name)
        return quantized_as(weight)

    def weight_dtype(self) -> torch.dtype:
        return dtype_of(self.weight)

    def why_not_merge(self) -> str:
        return super().why_not_merge() or f"its weight is quantized ({self.quantized()})"

    def dense_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' in dequantized form, for code that reads the weight instead of calling the layer."""
        return super().dense_weight(dequantize(self))

    def base_values(self) -> torch.Tensor:
        return local(dequantize(self))

    def merged_weight(self, weight: torch.Tensor, blocks: Blocks, cost: list[float] | None = None) -> torch.Tensor:
        """Return W' in the dtype of the dequantized weight."""
        return super().merged_weight(dequantize(self), blocks, cost)

    def weight_values(self) -> torch.Tensor:
        return dequantize(self)

    def weight_shape(self) -> torch.Size:
        linear = cast(nn.Linear, self)
        return torch.Size((linear.out_features, linear.in_features))


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
