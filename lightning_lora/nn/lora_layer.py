"""LoRALayer: what every adapted layer has in common.

Invariants, for every adapted layer:
    - its class is a subclass of the class it had; module tree, names, parameter objects and storage stay;
    - lora_active False means: run the base class's own forward and nothing else;
    - a weight named in lora_kept holds W'; lora_merged with nothing kept means that the layer stays factored.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import copy_, full, is_sharded, like, local
from ..distributed.tensor_parallel import beside
from ..errors import LoRAError
from ..names import A, B, canonical
from .exact_merge import Kept, Observer, add_delta_, merged_weight, remove_delta_, restored
from .gradient_checkpointing import records_gradients
from .init import initial_factors
from .low_rank import HALF, Piece, _delta, cut


class Swapped(nn.Module):
    """A module whose class was replaced.

    fully_shard in turn subclasses the class that it finds; such a module is rebuilt, or not, as torch decides.

    Attributes:
        lora_mixin, lora_base: the two classes that the subclass combines.
    """

    lora_mixin: ClassVar[type[Swapped]]
    lora_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        ours = type(self) is swapped_class(self.lora_mixin, self.lora_base)
        if ours and make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *rest)
        return (make, args, *rest)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """The one subclass of a pair of mixin and base class."""
    return _CLASSES.get((mixin, base)) or _CLASSES.setdefault((mixin, base), _make_class(mixin, base))


def base_class(module: Swapped) -> type[nn.Module]:
    """The class that a module would have without the swap."""
    ours = swapped_class(module.lora_mixin, module.lora_base)
    if type(module) is ours:
        return module.lora_base
    bases = tuple(module.lora_base if base is ours else base for base in type(module).__bases__)
    own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__.replace(ours.__name__, module.lora_base.__name__), bases, own)


_CLASSES: dict[tuple[type, type], type[Swapped]] = {}


def _make_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    own = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_mixin": mixin, "lora_base": base}
    return type(f"LoRA{base.__name__}", (mixin, base), own)


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)


STEPS = 2**16


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Zero each element of x with probability p; returns that and the factor that keeps its expectation.

    On the CPU, torch's own dropout takes many times as long as the adapter's products. Here 16 random bits decide each
    element: p is taken to the nearest 1/65536, and the factor belongs to that p, so nothing is biased.
    """
    if x.device.type != "cpu" or is_sharded(x):
        return F.dropout(x, p), 1.0
    steps = min(max(round(p * STEPS), 1), STEPS - 1)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64, device=x.device)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(bits < steps - STEPS // 2, 0), STEPS / (STEPS - steps)


Pieces = Mapping[str, list[Piece]]  # by weight name


class LoRALayer(Swapped):
    """Mixed in front of a layer's own class; a subclass says how B @ A maps to the weight (arXiv:2106.09685).

    Attributes:
        lora_A, lora_B: the factors, shapes as the subclass states.
        lora_r, lora_alpha, lora_scaling, lora_dropout: their options.
        lora_dropping: whether dropout acts where gradients are recorded; None follows the layer's own training flag.
        lora_wide: the factors stay in float32 when the model is cast to 16 bits.
        lora_own_forward: the class has a forward of its own, which is run on W + delta.
        lora_enabled: which equal parts of a fused projection are adapted, or None.
        lora_active: whether forward applies the adapter.
        lora_merged: merge was called.
        lora_kept: what undoing it needs, by weight name.
        lora_damaged: unmerging failed, so the weight is not known to be W.
        lora_tied: what keeps the weight from being merged, as another owner of it, or "".
        lora_reported: the cost of rounding W' was reported.
        lora_init: how to draw the factors, and the seed.
        lora_sharded: the weight was last seen sharded.
    """

    KNOWN_FORWARD: ClassVar[tuple[str, ...]] = ("forward",)
    ALONG: ClassVar[dict[int, tuple[str, int]]] = {0: (B, 0), 1: (A, 1)}  # what runs along each weight dimension
    LOOKUP: ClassVar[bool] = False
    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_r: int
    lora_alpha: float
    lora_scaling: float
    lora_dropout: float
    lora_dropping: bool | None
    lora_wide: bool
    lora_own_forward: bool
    lora_enabled: tuple[bool, ...] | None
    lora_active: bool
    lora_merged: bool
    lora_kept: dict[str, Kept]
    lora_damaged: bool
    lora_tied: str
    lora_reported: bool
    lora_init: tuple[bool | str, int]
    lora_sharded: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        if self.lora_own_forward:
            return self.forward_on_sum(*args, **kwargs)
        return self.factored_forward(*args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's own forward."""
        return super().forward(*args, **kwargs)

    def factored_forward(self, *args: Any, **kwargs: Any) -> Any:
        """base(x) + s * B(A(dropout(x))), without ever building B @ A."""
        raise NotImplementedError

    def forward_on_sum(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's own forward on W + delta, differentiable in A and B.

        Dropout acts on whole input features, the same for the batch, because the input is out of reach here.
        """
        with self.sum_as_weight():
            return super().forward(*args, **kwargs)

    @contextmanager
    def sum_as_weight(self) -> Iterator[None]:
        """W + delta stands in for each adapted weight, for code that reads it."""
        factor: torch.Tensor = self.lora_A
        if self.drops():
            mask = factor.new_ones(1, factor.shape[1], *[1] * (factor.dim() - 2))
            factor = factor * F.dropout(mask, self.lora_dropout)
        weights = self.adapted_weights()
        sums = {}
        for name, delta in self.deltas(factor, self.lora_B).items():
            weight = weights[name]
            if name not in self._parameters:
                raise LoRAError(f"{type(self).__name__}: {name} is computed from others since injection; undo that.")
            sums[name] = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)
        try:
            self._parameters.update(cast(dict[str, nn.Parameter | None], sums))
            yield
        finally:
            self._parameters.update(weights)

    def drops(self) -> bool:
        """Whether dropout acts now; a user's own evaluation inside a training batch records no gradients."""
        active = self.training if self.lora_dropping is None else self.lora_dropping and records_gradients()
        return active and self.lora_dropout > 0

    def dropped(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The adapter's input after dropout, and the scaling that goes with it."""
        x, factor = drop(x, self.lora_dropout) if self.drops() else (x, 1.0)
        return x, self.lora_scaling * factor

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that the adapter changes, by name."""
        return {"weight": self.weight}

    def main_weight(self) -> nn.Parameter:
        """The first of them, for dtype and device."""
        return next(iter(self.adapted_weights().values()))

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        raise NotImplementedError

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[Piece]]:
        """How the factors make up each adapted weight's delta, without the scaling."""
        raise NotImplementedError

    def create_factors(self, dtype: torch.dtype) -> None:
        """Register A and B with their initial values."""
        device = self.main_weight().device
        for name, values in zip((A, B), self._drawn(), strict=True):
            self.register_parameter(name, nn.Parameter(values.to(device, dtype)))

    def _drawn(self) -> tuple[torch.Tensor, torch.Tensor]:
        return initial_factors(*self.factor_shapes(), *self.lora_init, lookup=self.LOOKUP)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; parallelize_module comes here with each parameter made into a sharded one."""
        if name in (A, B) and param is not None:
            if is_sharded(param) and self.lora_enabled is not None:
                raise LoRAError(
                    f"{type(self).__name__}: the parts of enable_lora do not follow a tensor parallel split; adapt the "
                    "layer as a whole, or leave it out of the parallelize plan"
                )
            param = beside(name, param, self.main_weight(), self.ALONG)
        super().register_parameter(name, param)

    def local_pieces(
        self, weights: Mapping[str, torch.Tensor], factor_a: torch.Tensor, factor_b: torch.Tensor
    ) -> dict[str, list[Piece]]:
        """The pieces cut to this rank's shards of the weights. Collective where the factors are sharded."""
        pieces = self.pieces(full(factor_a), full(factor_b))
        return {name: cut(pieces[name], weights[name]) for name in pieces}

    def deltas(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, torch.Tensor]:
        """s * B @ A in each weight's shape and the factors' dtype, differentiable."""
        weights = self.adapted_weights()
        return {
            name: _delta(pieces, weights[name].shape) * self.lora_scaling
            for name, pieces in self.pieces(factor_a, factor_b).items()
        }

    def stays_factored(self) -> str:
        """Why merging would be wrong for this layer, or ''."""
        return self.lora_tied

    def merge_(self, *, copy: bool, observe: Observer | None = None, pieces: Pieces | None = None) -> None:
        """Each weight <- W' on this rank's shard, see exact.add_delta_; `pieces` are the local ones, if known."""
        weights = self.adapted_weights()
        pieces = self.local_pieces(weights, self.lora_A, self.lora_B) if pieces is None else pieces
        try:
            for name in pieces:
                if name not in self.lora_kept:
                    shard, scaling = local(weights[name]), self.lora_scaling
                    self.lora_kept[name] = add_delta_(shard, pieces[name], scaling, copy=copy, observe=observe)
        except BaseException:
            self.unmerge_()
            raise
        vars(self).update(lora_active=False, lora_merged=True)  # nn.Module's __setattr__ would take many times as long

    def unmerge_(self) -> None:
        """Each weight <- W, see exact.remove_delta_."""
        failure = None
        for name, weight in self.adapted_weights().items():
            if name in self.lora_kept:
                try:
                    remove_delta_(local(weight), self.lora_kept[name])
                except LoRAError as error:
                    failure, self.lora_damaged = error, True
                del self.lora_kept[name]
        vars(self).update(lora_active=True, lora_merged=False)
        if failure:
            raise failure

    @contextmanager
    def briefly_unmerged(self) -> Iterator[None]:
        """Unmerged inside, so that what changes a weight there (a move, a cast, a load) changes W."""
        if not self.lora_kept:
            yield
            return
        copy = any(kept.copy is not None for kept in self.lora_kept.values())
        self.unmerge_()
        yield
        try:
            self.merge_(copy=copy)
        except LoRAError as error:
            rest = "It is unmerged, others may be merged still: call unmerge(model), then repeat or undo the change."
            raise LoRAError(f"{self} was merged when it was cast, moved or loaded into; now {error}. {rest}") from error

    def original(self, name: str) -> torch.Tensor:
        """A parameter as it is without the adapter, detached: live, or a restored copy while merged."""
        weight: torch.Tensor = getattr(self, name).detach()
        if self.lora_damaged and name in self.adapted_weights():
            raise LoRAError(
                f"{type(self).__name__}: its base weight could not be restored after merging, so nothing is saved "
                "from it; load the base weights again"
            )
        kept = self.lora_kept.get(name)
        return weight if kept is None else like(restored(local(weight), kept), weight)

    def merged_copies(self, weights: Mapping[str, torch.Tensor], pieces: Pieces) -> dict[str, torch.Tensor]:
        """W' of each adapted weight for the given W and local pieces, as new tensors, sharded as W is."""
        return {
            name: like(merged_weight(local(weights[name]), pieces[name], self.lora_scaling), weights[name])
            for name in pieces
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        unborn = self.lora_A.is_meta
        with self.briefly_unmerged():
            super()._apply(self._keeping_wide(fn), recurse)  # type: ignore[no-untyped-call]
        if unborn and not self.lora_A.is_meta:  # to_empty
            for factor, values in zip((self.lora_A, self.lora_B), self._drawn(), strict=True):
                copy_(factor, values)
        return self

    def _keeping_wide(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """fn, but for casting the factors to 16 bits: they train in float32 while they compute in the layer's dtype."""
        factors = {id(t) for p in (self.lora_A, self.lora_B) for t in (p, p.grad) if t is not None}

        def careful(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            narrows = moved.dtype in HALF and tensor.dtype not in HALF
            return tensor.to(moved.device) if narrows and id(tensor) in factors else moved

        return careful if self.lora_wide else fn

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_kept or self.lora_damaged:
            destination.update({prefix + name: self.original(name) for name in self.adapted_weights()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self.briefly_unmerged():
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.lora_damaged = self.lora_damaged and any(prefix + n not in state_dict for n in self.adapted_weights())

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = super().__reduce_ex__(protocol)
        if self.lora_kept and isinstance(rest[0], dict):
            # Another machine may compute other last bits: hand over plain copies.
            rest[0] = rest[0] | {"lora_kept": {name: Kept([], copy=self.original(name)) for name in self.lora_kept}}
        return (make, args, *rest)


def strip_(layer: LoRALayer) -> None:
    """The inverse of adapt_: the class it had, no factors, no attributes; the weight stays as it is."""
    layer.__class__ = base_class(layer)  # type: ignore[assignment]
    for name in (A, B):
        layer._parameters.pop(name, None)
    for name in [name for name in vars(layer) if name.startswith("lora_")]:
        delattr(layer, name)


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of a model, by name."""
    return {canonical(name): module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
