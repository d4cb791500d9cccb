"""Linear layers: nn.Linear, also with a quantised weight, transformers' Conv1D and fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import is_sharded, local
from . import low_rank
from .adapted_weights import Blocks
from .added_product import add_product
from .lora_layer import LoRALayer
from .low_rank import enabled_parts
from .low_rank_sum import compute_dtype, low_rank_sum, runs_as_one
from .quantised import dequantize, dtype_of, quantised_as, quantised_parameters, refuse_bytes
from .transforms import lies_in_rows, runs_as_written


class LoRALinear(LoRALayer):
    """nn.Linear: weight (out, in), A (r, in), B (out, r).

    With n of m equal parts adapted, A is (n * r, in) and B is (n * out / m, r).
    """

    KIND = low_rank.LINEAR

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not quantised_parameters(module)

    def sum_forward(self, input: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not input.is_cpu and runs_as_one(input, self.weight):  # looking up the weight takes longer than the rest
            return self._as_one(input, a, b)
        plain = self.lora.spec.enabled is None and type(input) is torch.Tensor and lies_in_rows(input)
        if plain and runs_as_written():
            return self._accumulated(input, a, b)
        return self._concatenated(input, a, b)

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def low_rank_product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def _as_one(self, input: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Run as one operation of autograd, which asks a device for less."""
        x = input.to(compute_dtype(input))
        dropped, scaling = self.dropped(x)
        weight = low_rank.matrix_view(self.KIND, self.weight)
        parts = low_rank.part_outputs(len(weight), self.lora.spec.enabled)
        bias = getattr(self, "bias", None)
        return low_rank_sum(x, weight, bias, a, b, scaling, None if dropped is x else dropped, parts)

    def _accumulated(self, input: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor) -> torch.Tensor:
        """Add the adapter's product in place to the base's output: one full-size tensor instead of three."""
        rows = input.view(-1, input.shape[-1])
        x, scaling = self.dropped(rows)
        hidden = torch.mm(factor_a.to(x.dtype), x.t())
        # Computed after hidden, so that backward comes to it first. Its gradient of the input is no view, so autograd
        # adds the other gradient to it in place.
        base = cast(torch.Tensor, self.base_forward(rows))
        # Contiguous, so that autograd computes the gradient of B with the thin factor on the left.
        base.addmm_(hidden.t().to(base.dtype), factor_b.to(base.dtype).t().contiguous(), alpha=scaling)
        # autograd must not see a view: fully_shard's hooks on the output would be lost if a view were changed in place.
        shape = (*input.shape[:-1], base.shape[-1])
        return base if input.dim() == 2 else cast(torch.Tensor, torch.ops.aten._unsafe_view(base, shape))

    def _concatenated(self, input: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor) -> torch.Tensor:
        """Add the adapter's outputs part by part; for fused projections and inputs that cannot be viewed as rows."""
        base = self.base_forward(input)
        x, scaling = self.dropped(input)
        if is_sharded(x) and self.lora.spec.enabled is None:
            from ..distributed.tensor_parallel import low_rank_product  # imported here: slow to import, rarely needed

            product = low_rank_product(x, factor_a.to(x.dtype), factor_b.to(x.dtype), scaling)
            if product is not None:
                return cast(torch.Tensor, base + product)
        factor_a, factor_b = factor_a.to(x.dtype), factor_b.to(x.dtype)
        if self.lora.spec.enabled is None:
            return cast(torch.Tensor, base + F.linear(F.linear(x, factor_a), factor_b) * scaling)
        outputs, end = [], 0
        for start, a, b in enabled_parts(factor_a, factor_b, self.lora.spec.enabled):
            if start > end:
                outputs.append(base.new_zeros(*base.shape[:-1], start - end))
            outputs.append(F.linear(F.linear(x, a), b) * scaling)
            end = start + b.shape[0]
        if end < base.shape[-1]:
            outputs.append(base.new_zeros(*base.shape[:-1], base.shape[-1] - end))
        return cast(torch.Tensor, base + (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)))


class LoRAConv1D(LoRALinear):
    """transformers' Conv1D: a linear layer with the weight stored as (in, out). A and B are as for nn.Linear."""

    KIND = low_rank.CONV1D

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_conv1d(module)

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight)


class LoRAQuantisedLinear(LoRALinear):
    """A linear layer with a quantised weight: the forward of its own class, plus the factors' product.

    The weight is never written to, and the forward dequantises no more than that class does.
    """

    KNOWN_FORWARD = ()  # any forward counts as that of a linear layer, because W + delta would be a dequantised copy

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and bool(quantised_parameters(module))

    def quantised(self) -> str:
        weight = quantised_parameters(self).get("weight", self.weight)
        refuse_bytes(weight, self.lora.name)
        return quantised_as(weight)

    def weight_dtype(self) -> torch.dtype:
        return dtype_of(self.weight)

    def unmergeable_reason(self) -> str:
        return super().unmergeable_reason() or f"its weight is quantised ({self.quantised()})"

    def sum_forward(self, input: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.lora.spec.enabled is not None or not runs_as_one(input, input):
            return super().sum_forward(input, a, b)
        x, scaling = self.dropped(input)
        hidden = F.linear(x, a.to(x.dtype))  # before the base's forward, as in _accumulated
        return add_product(self.base_forward(input), hidden, b, scaling)

    def dense_weights(self, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W + delta in dequantised form, for code that reads the weight instead of calling the layer."""
        values = {name: cast(nn.Parameter, dequantize(self, name)) for name in weights}
        return super().dense_weights(values)

    def base_values(self, name: str) -> torch.Tensor:
        return local(dequantize(self, name))

    def merged_copies(self, weights: Mapping[str, torch.Tensor], blocks: Blocks) -> dict[str, torch.Tensor]:
        """Return W' in the dtype of the dequantised weights."""
        return super().merged_copies({name: dequantize(self, name) for name in blocks}, blocks)

    def weight_values(self) -> dict[str, torch.Tensor]:
        return {"weight": dequantize(self)}

    def weight_shapes(self) -> dict[str, torch.Size]:
        linear = cast(nn.Linear, self)
        return {"weight": torch.Size((linear.out_features, linear.in_features))}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
