"""The kinds of adapted layers: how B @ A maps to each layer's weight, and each factored forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .base import A, B, LoRALayer
from .exact import Piece
from .parallel import low_rank, summed
from .sharding import is_sharded
from .swapped import swapped_class


class LoRALinear(LoRALayer):
    """nn.Linear: weight (out, in), A (r, in), B (out, r); with enabled parts A (n*r, in), B (n*out/len, r)."""

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self._features()
        parts = self.lora_enabled or (True,)
        return (sum(parts) * self.lora_r, in_features), (out_features // len(parts) * sum(parts), self.lora_r)

    def _features(self) -> tuple[int, int]:
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def parts(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first output, A, B) of each adapted part; a plain layer is one part."""
        if self.lora_enabled is None:
            return [(0, factor_a, factor_b)]
        size = self._features()[0] // len(self.lora_enabled)
        starts = [i * size for i, enabled in enumerate(self.lora_enabled) if enabled]
        return list(zip(starts, torch.split(factor_a, self.lora_r), torch.split(factor_b, size), strict=True))

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(start, 0, b, a) for start, a, b in self.parts(factor_a, factor_b)]}

    def factored_forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.lora_enabled is None and input.dim() > 1 and type(input) is torch.Tensor and input.is_contiguous():
            return self._accumulated(input)
        return self._concatenated(input)

    def _accumulated(self, input: torch.Tensor) -> torch.Tensor:
        """The adapter's product summed straight into the base's output: one full-size tensor instead of three."""
        rows = input.view(-1, input.shape[-1])
        x, scaling = self.dropped(rows)
        # These layouts make autograd form both gradients with the thin factor on the left: several times faster on CPU.
        hidden = torch.mm(self.lora_A.to(x.dtype), x.t())
        # After hidden, so that its gradient of the input is there first: no view, so the other is added in place.
        base = cast(torch.Tensor, self.base_forward(rows))
        base.addmm_(hidden.t(), self.lora_B.to(base.dtype).t().contiguous(), alpha=scaling)
        # Not a view to autograd: fully_shard's hooks on the output would be lost to an in-place change of one.
        shape = (*input.shape[:-1], base.shape[-1])
        return base if input.dim() == 2 else cast(torch.Tensor, torch.ops.aten._unsafe_view(base, shape))

    def _concatenated(self, input: torch.Tensor) -> torch.Tensor:
        """For parts of a fused projection, and for inputs that cannot be seen as rows."""
        base = self.base_forward(input)
        x, scaling = self.dropped(input)
        if is_sharded(x) and self.lora_enabled is None:
            product = low_rank(x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
            if product is not None:
                return cast(torch.Tensor, base + product * scaling)
        outputs, done = [], 0
        for start, a, b in self.parts(self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)):
            if start > done:
                outputs.append(base.new_zeros(*base.shape[:-1], start - done))
            outputs.append(F.linear(F.linear(x, a), b) * scaling)
            done = start + b.shape[0]
        if done < base.shape[-1]:
            outputs.append(base.new_zeros(*base.shape[:-1], base.shape[-1] - done))
        adapted = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return cast(torch.Tensor, base + adapted)


class LoRAConv1D(LoRALinear):
    """transformers' Conv1D, a linear layer with its weight stored (in, out); A and B as for nn.Linear."""

    ALONG = {0: (A, 1), 1: (B, 0)}  # noqa: RUF012

    def _features(self) -> tuple[int, int]:
        in_features, out_features = self.weight.shape
        return out_features, in_features

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(0, start, a.T, b.T) for start, a, b in self.parts(factor_a, factor_b)]}

    def factored_forward(self, x: torch.Tensor) -> torch.Tensor:  # as Conv1D names it
        return super().factored_forward(x)


class LoRAEmbedding(LoRALayer):
    """nn.Embedding: weight (num, dim), A (r, num), B (dim, r), no dropout (as PEFT and loralib).

    max_norm would renormalise W in place; such a layer stays factored, on rows renormalised out of place.
    """

    ALONG = {0: (A, 1), 1: (B, 0)}  # noqa: RUF012
    LOOKUP = True
    embedding: nn.Embedding

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.lora_r, self.weight.shape[0]), (self.weight.shape[1], self.lora_r)

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(0, 0, factor_a.T, factor_b.T)]}

    def stays_factored(self) -> str:
        return super().stays_factored() or ("max_norm renormalises its rows in place" if self._renormalises() else "")

    def _renormalises(self) -> bool:
        return cast(nn.Embedding, self).max_norm is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.lora_active or self.weight.requires_grad or not self._renormalises():
            return super().forward(*args, **kwargs)
        if not self.lora_own_forward:
            return self._renormalised(*args, **kwargs)
        weight = self.weight
        try:
            self._parameters["weight"] = nn.Parameter(weight.detach().clone(), False)
            return super().forward(*args, **kwargs)
        finally:
            self._parameters["weight"] = weight

    def _renormalised(self, input: torch.Tensor) -> torch.Tensor:
        layer = cast(nn.Embedding, self)
        if self.weight.requires_grad:  # unfrozen by the user: trained as the base class does it
            return cast(torch.Tensor, self.base_forward(input))
        rows = self.weight.detach()[input]
        flat = rows.view(-1, rows.shape[-1])
        each = torch.arange(flat.shape[0], device=flat.device)
        torch.embedding_renorm_(flat, each, cast(float, layer.max_norm), layer.norm_type)
        return rows

    def factored_forward(self, input: torch.Tensor) -> torch.Tensor:
        base = self._renormalised(input) if self._renormalises() else self.base_forward(input)
        a, b = self.lora_A.to(base.dtype), self.lora_B.to(base.dtype)
        delta = F.linear(summed(F.embedding(input, a.T)), b) * self.lora_scaling
        delta = self._trained_as_rows(delta, input) if torch.is_grad_enabled() else delta
        return summed(base).add_(delta)

    def _trained_as_rows(self, delta: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """padding_idx and scale_grad_by_freq are about rows of the weight, so about both factors."""
        layer = cast(nn.Embedding, self)
        if layer.padding_idx is not None:
            delta = torch.where((input == layer.padding_idx).unsqueeze(-1), delta.detach(), delta)
        if layer.scale_grad_by_freq:
            occurs = torch.bincount(input.flatten(), minlength=layer.num_embeddings)[input].unsqueeze(-1)
            delta = delta.detach() + (delta - delta.detach()) / occurs.to(delta.dtype)
        return delta


class LoRAConv(LoRALayer):
    """nn.Conv1d/2d/3d: weight (Cout, Cin/groups, k...), A (r, Cin/groups, k...), B (Cout, r, 1...).

    delta is B @ A on the flattened weight. Where convolving with A costs as much as with W (r * groups >= Cout, as in
    depthwise layers), the layer runs on W + delta.
    """

    KNOWN_FORWARD = ("forward", "_conv_forward")

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, *rest = self.weight.shape
        return (self.lora_r, *rest), (out_channels, self.lora_r, *[1] * (len(rest) - 1))

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        return {"weight": [Piece(0, 0, factor_b.flatten(1), factor_a.flatten(1))]}

    def factored_forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = cast(nn.Conv2d, self)
        if self.lora_r * layer.groups >= layer.out_channels and not self.drops():
            return cast(torch.Tensor, self.forward_on_sum(input))
        base = self.base_forward(input)
        x, scaling = self.dropped(input)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if layer.groups > 1:  # every group goes through the whole of A, then through its own rows of B
            a = a.repeat(layer.groups, *[1] * (a.dim() - 1))
        hidden = layer._conv_forward(x, a, None)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[b.dim() - 3]
        return cast(torch.Tensor, base.add_(convolve(hidden, b, groups=layer.groups), alpha=scaling))


class LoRAMultiheadAttention(LoRALinear):
    """nn.MultiheadAttention's in_proj: W (3E, E), A (r, E), B (3E, r); its out_proj is a layer of its own.

    With key and value widths of their own there are three weights; A then holds the A of each, side by side:
    (r, E + kdim + vdim). Enabled parts are q, k and v. It always runs on W + delta.
    """

    def _layer(self) -> nn.MultiheadAttention:
        return cast(nn.MultiheadAttention, self)

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        names = ("in_proj_weight",) if self._layer()._qkv_same_embed_dim else self._separate()
        return {name: getattr(self, name) for name in names}

    def _separate(self) -> list[str]:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        enabled = self.lora_enabled or (True, True, True)
        return [name for name, adapted in zip(names, enabled, strict=True) if adapted]

    def _features(self) -> tuple[int, int]:
        layer = self._layer()
        return 3 * layer.embed_dim, layer.embed_dim

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._layer()._qkv_same_embed_dim:
            return super().factor_shapes()
        inputs = [weight.shape[1] for weight in self.adapted_weights().values()]
        return (self.lora_r, sum(inputs)), (len(inputs) * self._layer().embed_dim, self.lora_r)

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        if self._layer()._qkv_same_embed_dim:
            return {"in_proj_weight": super().pieces(factor_a, factor_b)["weight"]}
        weights = self.adapted_weights()
        parts_a = torch.split(factor_a, [weight.shape[1] for weight in weights.values()], dim=1)
        parts_b = torch.split(factor_b, self._layer().embed_dim)
        return {name: [Piece(0, 0, b, a)] for name, a, b in zip(weights, parts_a, parts_b, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        with reading_sum(self._layer().out_proj):
            return self.forward_on_sum(*args, **kwargs)


def reading_sum(layer: nn.Module) -> AbstractContextManager[None]:
    """W + delta inside, where an adapter is active: for code that reads a layer's weight instead of calling it."""
    return layer.sum_as_weight() if isinstance(layer, LoRALayer) and layer.lora_active else nullcontext()


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
