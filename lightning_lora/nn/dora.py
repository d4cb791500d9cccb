"""DoRA (arXiv:2402.09353): A and B adapt the direction of each output's weights, and a magnitude m their norm.

    W' = c * V for each output,  V = W + s * B @ A,  c = m / norm(V)

norm(V) is a constant for the gradient, as in section 4.3 of the paper and in PEFT. On the CPU norm(W)^2 is cached while
W does not change. m starts as norm(V), rounded like norm(V) in later forwards, so that c is exactly 1 before the first
step. A device that the model moves to later may round another way, so there c counts as 1 within 4 ulp of float32. An
output whose weights are all zero has c = 1; in PEFT it gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from ..distributed.sharding import detached, full_tensor, is_sharded, is_spread
from ..errors import LoRAError
from ..names import A, B
from . import low_rank
from .adapted_weights import Blocks
from .autocast import without_autocast
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .linear import LoRAConv1D, LoRALinear
from .lora import PEFT_LEAVES, LoRA
from .lora_layer import LoRALayer
from .low_rank import LowRankBlock
from .output_norms import base_squares, forms_sums, output_norms, output_norms_of_parts, output_scale
from .scaled_output import near_one
from .variant import (
    Acting,
    LayerClass,
    Place,
    Reader,
    Stored,
    Weights,
    scaled_blocks,
)
from .weight_mark import WeightMark, is_wrapped, mark_of

MAGNITUDE = "lora_magnitude"  # leaf name: (out,)
WEIGHT = "weight"
BASE_SQUARES = "lora_base_squares"  # attribute of a layer: BaseSquares of W
SQUARES_BEFORE = "lora_squares_before"  # attribute of a merged layer: its BaseSquares from before, kept for unmerging


class DoRA(LoRA):
    """LoRA with a trained magnitude for each output (arXiv:2402.09353)."""

    name, title = "dora", "DoRA"
    trained: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE)
    peft_type = "LORA"
    peft_attention = False
    peft_leaves: ClassVar[Mapping[str, str]] = {
        **PEFT_LEAVES,
        "lora_magnitude_vector": MAGNITUDE,
        "lora_magnitude_vector.weight": MAGNITUDE,  # of a live model
    }
    placed_as: ClassVar[Mapping[str, str]] = {}
    reads_weight = follows_weight = True

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(place)
        return {**shapes, MAGNITUDE: shapes[B][:1]}

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        plain = super().start(place, weights)
        return {**plain, MAGNITUDE: self._norms(plain, place, weights()[WEIGHT])}

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        a, b = stored[A], stored[B]
        if weight is None:
            return Acting(a, b)
        plain = a.detach().flatten(1), b.detach().flatten(1)
        norms = output_norms(weight.detach(), *plain, scaling, transposed=False)
        return Acting(a, b, output_scale(stored[MAGNITUDE], norms))

    def blocks(self, stored: Stored, place: Place, read: Reader) -> dict[str, list[LowRankBlock]]:
        a, b = (stored[leaf].detach().flatten(1) for leaf in (A, B))
        norms = output_norms_of_parts(read(WEIGHT), a, b, place.scaling, transposed=place.is_transposed)
        scale = output_scale(stored[MAGNITUDE], norms)
        blocks = place.low_rank_blocks(stored[A], stored[B])[WEIGHT]
        return {WEIGHT: scaled_blocks(blocks, scale, transposed=place.is_transposed)}

    def options(self) -> dict[str, Any]:
        return {"use_dora": True}

    def to_peft(self, stored: Stored, place: Place) -> dict[str, torch.Tensor]:
        """Return the tensors with PEFT's shapes: a convolution's magnitudes are (1, out, 1...)."""
        kernel, magnitude = stored[A].dim() - 2, stored[MAGNITUDE]
        return {**stored, MAGNITUDE: magnitude.view(1, -1, *[1] * kernel) if kernel else magnitude}

    def from_peft(self, found: Stored, place: Place) -> dict[str, torch.Tensor]:
        magnitude = found.get(MAGNITUDE)
        if magnitude is None or magnitude.dim() < 3 or magnitude.numel() != magnitude.shape[1]:
            return dict(found)  # unchanged; a wrong shape is reported later
        return {**found, MAGNITUDE: magnitude.flatten()}

    @property
    def option(self) -> str:
        return "use_dora"

    def layer_class(self, plain: LayerClass) -> LayerClass | None:
        return cast("LayerClass | None", cast("Mapping[type, type]", LAYERS).get(plain))

    def _norms(self, stored: Stored, place: Place, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_meta:
            return torch.empty(len(stored[B]), device="meta")
        with torch.no_grad(), without_autocast(weight.device.type):
            a, b = (stored[leaf].to(weight.device).flatten(1) for leaf in (A, B))
            return output_norms(detached(weight), a, b, place.scaling, transposed=place.is_transposed)


class BaseSquares(NamedTuple):
    """norm(W)^2 of each output, with a mark of W.

    The two are one object, so that another thread never sees one without the other.
    """

    mark: WeightMark
    values: torch.Tensor


class DoRALayer(LoRALayer):
    """A layer with a magnitude for each output: lora_magnitude (out,). norm(W)^2 is cached while W does not change."""

    TRANSIENT = (BASE_SQUARES, SQUARES_BEFORE)
    ATTRIBUTES = (*LoRALayer.ATTRIBUTES, *TRANSIENT)
    lora_magnitude: nn.Parameter

    def factored_forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Return c * (base(x) + s * B(A(x))). The scale c leaves the bias alone.

        Dropout acts as in PEFT: a dropped feature contributes W instead of c * V to the weight.
        """
        input = self.factored_input(args, kwargs)
        if input is None:
            return cast(torch.Tensor, self.dense_forward(*args, **kwargs))
        a, b = self._factors_of_forward()
        scale = self._scale(a, b)
        if self.drops() and not self.LOOKUP:
            return self._dropped_forward(input, Acting(a, b, scale))
        return self.scaled(self.sum_forward(input, a, b), scale)

    def _factors_of_forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B; on a GPU in the dtype of W, so that the norm and the products cast them once."""
        a, b, weight = self.lora_A, self.lora_B, self.weight
        if weight.dtype == a.dtype or not forms_sums(weight) or torch.is_autocast_enabled(weight.device.type):
            return a, b
        return a.to(weight.dtype), b.to(weight.dtype)

    def _dropped_forward(self, input: torch.Tensor, acting: Acting) -> torch.Tensor:
        a, b, scale = acting
        change = self.over_outputs(cast(torch.Tensor, scale) - 1)
        base = cast(torch.Tensor, self.base_forward(input))
        x, scaling = self.dropped(input)
        product = self.low_rank_product(x, a, b).to(base.dtype) * scaling
        sums = torch.add(product, self.base_product(x), alpha=scaling / self.lora.spec.scaling)
        return torch.addcmul(base + product, sums, change.to(base.dtype))

    def acting(self) -> Acting:
        return Acting(self.lora_A, self.lora_B, self.scale())

    def combine(
        self, weight: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert scale is not None
        sums = seen = weight + delta
        if mask is not None:
            seen = weight * (mask.T if self.is_transposed() else mask) + delta
        return torch.addcmul(sums, seen, low_rank.over_weight(self.KIND, scale - 1, weight).to(sums.dtype))

    def scale(self) -> torch.Tensor:
        """Return c (out,), differentiable in the magnitude."""
        return self._scale(self.lora_A, self.lora_B)

    def _scale(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return output_scale(self.lora_magnitude, self.norms(self.weight, a, b))

    def blocks(self, weights: Mapping[str, torch.Tensor], stored: Stored | None = None) -> Blocks:
        a, b, magnitude = (full_tensor((stored or self.stored())[leaf]) for leaf in (A, B, MAGNITUDE))
        scale = self._scale_for_merging(weights[WEIGHT], a, b, magnitude)
        blocks = scaled_blocks(self.place().low_rank_blocks(a, b)[WEIGHT], scale, transposed=self.is_transposed())
        return {WEIGHT: self.crop_to_shard(blocks, weights[WEIGHT])}

    def _scale_for_merging(
        self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor
    ) -> torch.Tensor:
        """Return c (out,) from the exact norm; on a GPU 1 where a forward, which rounds the norm otherwise, has 1."""
        scale = output_scale(magnitude, self.norms(weight, a, b, exact=True).to(magnitude.device))
        return scale.masked_fill((scale - 1).abs() <= near_one(scale.dtype), 1.0) if forms_sums(weight) else scale

    def is_transposed(self) -> bool:
        """Return whether the weight is stored (in, out)."""
        return self.KIND in low_rank.TRANSPOSED

    def norms(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Return norm(V) (out,), detached. Collective where the weight is sharded; `a` and `b` must not be sharded."""
        if weight.is_meta:
            return torch.empty(len(b), device="meta")
        with torch.no_grad(), without_autocast(weight.device.type):
            base = self._base_squares(weight) if self._stays(weight) else None
            a, b, scaling = a.detach().flatten(1), b.detach().flatten(1), self.lora.spec.scaling
            transposed = self.is_transposed()
            weight = detached(weight) if exact else weight.detach()  # in a forward a flat weight is gathered
            return output_norms(weight, a, b, scaling, transposed=transposed, base=base, exact=exact)

    def _stays(self, weight: torch.Tensor) -> bool:
        """Return whether norm(W)^2 is needed and can be cached."""
        if forms_sums(weight) or weight is not self._parameters.get(WEIGHT) or is_spread(weight):
            return False
        return not (weight.requires_grad or weight.is_inference() or is_wrapped(weight))

    def _base_squares(self, weight: torch.Tensor) -> torch.Tensor:
        """Return norm(W)^2 (out,), from the cache if W has not changed. Each write to W is noticed."""
        known: BaseSquares | None = vars(self).get(BASE_SQUARES)
        if known is None or not known.mark.sees_every_write() or not known.mark.is_of(weight):
            with torch.inference_mode(False):
                transposed = self.is_transposed()
                mark = mark_of(weight, dim=0 if transposed else 1)  # first, so that the next call sees a write from now
                known = BaseSquares(cast(WeightMark, mark), base_squares(weight.detach(), transposed=transposed))
            vars(self)[BASE_SQUARES] = known
        return known.values

    def weight_changed(self) -> None:
        for name in self.TRANSIENT:
            vars(self).pop(name, None)

    def before_merge(self) -> None:
        """Set norm(W)^2 aside while the weight holds W'."""
        known: BaseSquares | None = vars(self).pop(BASE_SQUARES, None)
        if known is not None:
            vars(self)[SQUARES_BEFORE] = known

    def after_unmerge(self) -> None:
        """Put norm(W)^2 back into the cache, unless another parameter has replaced the weight."""
        known: BaseSquares | None = vars(self).pop(SQUARES_BEFORE, None)
        vars(self).pop(BASE_SQUARES, None)
        if known is not None and known.mark.weight() is self.weight:
            vars(self)[BASE_SQUARES] = known._replace(mark=known.mark._replace(version=self.weight._version))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if is_sharded(param):  # only parallelize_module registers such a parameter; fully_shard does not call this
            raise LoRAError(
                f"{type(self).__name__}: the magnitudes of use_dora do not follow a tensor parallel split; leave the "
                "layer out of target_modules, or out of the parallelize plan."
            )
        self.weight_changed()
        super().register_parameter(name, param)


class DoRALinear(DoRALayer, LoRALinear):
    """nn.Linear."""


class DoRAConv1D(DoRALayer, LoRAConv1D):
    """transformers' Conv1D."""


class DoRAConv(DoRALayer, LoRAConv):
    """nn.Conv1d/2d/3d: one magnitude for each output channel."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """nn.Embedding: one magnitude for each dimension, over its values in the whole vocabulary, as in PEFT."""


LAYERS: dict[type[LoRALayer], type[LoRALayer]] = {  # class with magnitudes, by the class of plain LoRA
    LoRALinear: DoRALinear,
    LoRAConv1D: DoRAConv1D,
    LoRAConv: DoRAConv,
    LoRAEmbedding: DoRAEmbedding,
}
