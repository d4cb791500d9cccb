"""DoRA (arXiv:2402.09353): the direction of each output's weights is adapted by A and B, their length by a magnitude.

    W' = c * V by outputs,  V = W + s * B @ A,  c = m / norm(V)

The norm is no part of the gradient, as in the paper's section 4.3 and in PEFT; norm(W)^2 is kept while W stays. m
begins as norm(V), rounded as the norm is rounded later, so that c is exactly 1 before the first step. An output whose
weights are all zero has c = 1, where PEFT's outputs are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from ..distributed.sharding import copy_, full_tensor, is_sharded
from ..errors import LoRAError
from ..names import A, B
from . import low_rank
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .exact_merge import Observer, Scratch
from .linear import LoRAConv1D, LoRALinear
from .lora import LoRA
from .lora_layer import Blocks, LoRALayer, Transform
from .low_rank import LowRankBlock
from .output_norms import base_squares, output_norms, output_norms_of_parts, output_scale
from .variant import Acting, Config, LayerClass, Place, Reader, Stored, Weights, scaled_blocks
from .weight_mark import WeightMark, mark_of

MAGNITUDE = "lora_magnitude"  # leaf name: (out,)
WEIGHT = "weight"
BASE_SQUARES = "lora_base_squares"  # attribute: BaseSquares of W
SQUARES_BEFORE = "lora_squares_before"  # attribute of a merged layer: the same, for when it is unmerged
KEPT = (BASE_SQUARES, SQUARES_BEFORE)


class DoRA(LoRA):
    """LoRA whose outputs have magnitudes (arXiv:2402.09353)."""

    name, title = "dora", "DoRA"
    trained: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE)
    reads_weight = True

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
        a, b = (stored[leaf].detach().double().flatten(1) for leaf in (A, B))
        norms = output_norms_of_parts(read(WEIGHT), a, b, place.scaling, transposed=place.is_transposed)
        scale = output_scale(stored[MAGNITUDE], norms)
        blocks = place.low_rank_blocks(stored[A], stored[B])[WEIGHT]
        return {WEIGHT: scaled_blocks(blocks, scale, transposed=place.is_transposed)}

    @property
    def option(self) -> str:
        return "use_dora"

    def conflict(self, config: Config) -> tuple[str, str] | None:
        for option in ("enable_lora", "target_parameters"):
            if getattr(config, option):
                return option, f"left out with {self.option}, which adapts whole layers"
        if config.has_start:
            return "init_lora_weights", f"one that does not start from the weight, with {self.option}"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        if getattr(module, "max_norm", None) is None:
            return ""
        return "max_norm renormalises its rows in place, whose norms use_dora goes by; set it to None"

    def layer_class(self, plain: LayerClass) -> LayerClass | None:
        return cast("LayerClass | None", cast("Mapping[type, type]", LAYERS).get(plain))

    def _norms(self, stored: Stored, place: Place, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_meta:
            return torch.empty(len(stored[B]), device="meta")
        with torch.no_grad(), _without_autocast(weight.device.type):
            a, b = (stored[leaf].to(weight.device).flatten(1) for leaf in (A, B))
            return output_norms(weight.detach(), a, b, place.scaling, transposed=place.is_transposed)


class BaseSquares(NamedTuple):
    """norm(W)^2 of each output, and which W it belongs to; one object, so that no thread sees one without the other."""

    mark: WeightMark
    values: torch.Tensor


class DoRALayer(LoRALayer):
    """A layer whose outputs have magnitudes: `lora_magnitude` (out,), beside A and B."""

    lora_magnitude: nn.Parameter

    def factor_names(self) -> tuple[str, ...]:
        return (*super().factor_names(), MAGNITUDE)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return (*super().factors(), self.lora_magnitude)

    def factored_forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Return base(x) + s * B(A(x)), but for the bias times c; dropout acts on W too, as in PEFT.

        A dropped feature sees W instead of c * W.
        """
        if self.is_cheaper_dense():
            return cast(torch.Tensor, self.dense_forward(*args, **kwargs))
        (input,) = (*args, *kwargs.values())
        change, bias = self.over_outputs(self.scale() - 1), getattr(self, "bias", None)
        if self.drops() and not self.LOOKUP:
            return self._dropped_forward(input, change)
        sums = cast(torch.Tensor, super().factored_forward(input))
        change = change.to(sums.dtype)
        if bias is None:
            return torch.addcmul(sums, sums, change)
        return sums.addcmul_(sums - self.over_outputs(bias).to(sums.dtype), change)

    def _dropped_forward(self, input: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        base = cast(torch.Tensor, self.base_forward(input))
        x, scaling = self.dropped(input)
        product = self.low_rank_product(x).to(base.dtype) * scaling
        sums = torch.add(product, self.base_product(x), alpha=scaling / self.lora.spec.scaling)
        return torch.addcmul(base + product, sums, change.to(base.dtype))

    def over_outputs(self, values: torch.Tensor) -> torch.Tensor:
        """Return values (out,) in the shape in which they broadcast with the layer's outputs."""
        return values.view(-1, *[1] * (self.weight.dim() - 2))

    def over_weight(self, values: torch.Tensor) -> torch.Tensor:
        """Return values (out,) in the shape in which they broadcast with the weight."""
        if self.is_transposed():
            return values.view(1, -1)
        return values.view(-1, *[1] * (self.weight.dim() - 1))

    def combine(self, weight: torch.Tensor, delta: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        sums = seen = weight + delta
        if mask is not None:
            seen = weight * (mask.T if self.is_transposed() else mask) + delta
        return torch.addcmul(sums, seen, self.over_weight(self.scale() - 1).to(sums.dtype))

    def scale(self) -> torch.Tensor:
        """Return c (out,), differentiable in the magnitude."""
        return output_scale(self.lora_magnitude, self.norms(self.weight, self.lora_A, self.lora_B))

    def local_blocks(
        self, weights: Mapping[str, torch.Tensor], *factors: torch.Tensor
    ) -> dict[str, list[LowRankBlock]]:
        a, b, magnitude = map(full_tensor, factors)
        norms = self.norms(weights[WEIGHT], a, b, exact=True)
        scale = output_scale(magnitude, norms.to(magnitude.device))
        blocks = scaled_blocks(self.low_rank_blocks(a, b)[WEIGHT], scale, transposed=self.is_transposed())
        return {WEIGHT: self.crop_to_shard(blocks, weights[WEIGHT])}

    def is_transposed(self) -> bool:
        """Return whether the weight is stored (in, out)."""
        return self.KIND in low_rank.TRANSPOSED

    def norms(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Return norm(V) of each output, detached. Collective where the weight is sharded; the factors are whole."""
        if weight.is_meta:
            return torch.empty(len(b), device="meta")
        with torch.no_grad(), _without_autocast(weight.device.type):
            base = self._base_squares(weight, certain=exact) if self._stays(weight) else None
            a, b, scaling = a.detach().flatten(1), b.detach().flatten(1), self.lora.spec.scaling
            transposed = self.is_transposed()
            return output_norms(weight.detach(), a, b, scaling, transposed=transposed, base=base, exact=exact)

    def _stays(self, weight: torch.Tensor) -> bool:
        """Return whether norm(W) is worth keeping: W is frozen, and a write to it can be noticed."""
        if weight is not self._parameters.get(WEIGHT) or is_sharded(weight):
            return False
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if torch._C._get_tracing_state() is not None:  # of torch.jit.trace, which cannot record how bits are read
            return False
        if weight.requires_grad:  # what was kept may be stale when it is frozen again: fused optimizers are not counted
            vars(self).pop(BASE_SQUARES, None)
        return not (weight.requires_grad or weight.is_inference())

    def _base_squares(self, weight: torch.Tensor, *, certain: bool) -> torch.Tensor:
        """Return norm(W)^2, computed anew where W has changed; `certain`: or where a change could have gone unseen."""
        known: BaseSquares | None = vars(self).get(BASE_SQUARES)
        if known is None or (certain and not known.mark.sees_every_write()) or not known.mark.is_of(weight):
            with torch.inference_mode(False):
                transposed = self.is_transposed()
                mark = mark_of(weight, dim=0 if transposed else 1)  # first: a write meanwhile shows at the next call
                known = BaseSquares(cast(WeightMark, mark), base_squares(weight.detach(), transposed=transposed))
            vars(self)[BASE_SQUARES] = known
        return known.values

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            vars(self).pop(BASE_SQUARES, None)
        return super().train(mode)

    def merge_(
        self,
        *,
        copy: bool,
        observe: Observer | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        blocks: Blocks | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        weights = weights or self.adapted_weights()
        blocks = blocks or self.local_blocks(weights, *self.stored())
        known, merged = vars(self).get(BASE_SQUARES), bool(self.lora.records)
        super().merge_(copy=copy, observe=observe, weights=weights, blocks=blocks, scratch=scratch)
        if known is not None and not merged:
            vars(self)[SQUARES_BEFORE] = known

    def unmerge_(self) -> None:
        known = cast(BaseSquares | None, vars(self).pop(SQUARES_BEFORE, None))
        vars(self).pop(BASE_SQUARES, None)
        super().unmerge_()
        if known is not None and known.mark.weight() is self.weight:  # which has the bits that it had
            vars(self)[BASE_SQUARES] = known._replace(mark=known.mark._replace(version=self.weight._version))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if is_sharded(param):  # by parallelize_module; fully_shard does not come here
            raise LoRAError(
                f"{type(self).__name__}: the magnitudes of use_dora do not follow a tensor parallel split; leave the "
                "layer out of target_modules, or out of the parallelize plan."
            )
        vars(self).pop(BASE_SQUARES, None)
        super().register_parameter(name, param)

    def _apply(self, fn: Transform, recurse: bool = True) -> Any:
        vars(self).pop(BASE_SQUARES, None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load; magnitudes that are the initial ones still, and are not loaded themselves, are the new W's then."""
        magnitude = self._parameters[MAGNITUDE]
        new_base = prefix + WEIGHT in state_dict and state_dict.get(prefix + MAGNITUDE, magnitude) is magnitude
        with self._lora_briefly_unmerged():
            vars(self).pop(BASE_SQUARES, None)
            follow = new_base and self._is_drawn()
            super()._load_from_state_dict(state_dict, prefix, *args)
            vars(self).pop(BASE_SQUARES, None)
            if follow:
                copy_(self.lora_magnitude, self.drawn_factors()[-1].to(self.lora_magnitude.dtype))

    def _is_drawn(self) -> bool:
        """Return whether the magnitudes are the initial ones, bit for bit. Collective where W is sharded."""
        if self.lora_magnitude.is_meta or self.weight.is_meta:
            return False
        live = full_tensor(self.lora_magnitude)
        drawn = self.drawn_factors()[-1].to(live.device, live.dtype)
        return bool(((live == drawn) | (live.isnan() & drawn.isnan())).all())

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = super().__reduce_ex__(protocol)
        if isinstance(state[0], dict):
            state[0] = {name: value for name, value in state[0].items() if name not in KEPT}
        return (make, args, *state)


class DoRALinear(DoRALayer, LoRALinear):
    """nn.Linear."""


class DoRAConv1D(DoRALayer, LoRAConv1D):
    """transformers' Conv1D."""


class DoRAConv(DoRALayer, LoRAConv):
    """nn.Conv1d/2d/3d: one magnitude for each output channel."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """nn.Embedding: one magnitude for each dimension, of its values over the vocabulary, as in PEFT."""


LAYERS: dict[type[LoRALayer], type[LoRALayer]] = {  # the class in place of the plain one
    LoRALinear: DoRALinear,
    LoRAConv1D: DoRAConv1D,
    LoRAConv: DoRAConv,
    LoRAEmbedding: DoRAEmbedding,
}


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # to leave autocast takes as long as a small operation
