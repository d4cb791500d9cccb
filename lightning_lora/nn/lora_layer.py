"""LoRALayer: what every adapted layer has in common, and how a module becomes one and is plain again.

Invariants, for every adapted layer, and every parameter that is adapted by itself:
    - its module's class is a subclass of the class it had; module tree, names, parameter objects and storage stay;
    - lora_active False means: run the base class's own forward and nothing else;
    - a weight named in lora.records holds W'; lora.merged without records means that the layer stays factored.
"""

from __future__ import annotations

import copyreg
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..config import is_start
from ..distributed.sharding import copy_, from_local_like, full_tensor, is_sharded, local, window
from ..errors import LoRAError
from ..names import START_A, START_B, A, B, canonical, names_factor
from . import low_rank
from .exact_merge import (
    Observer,
    RestoreRecord,
    Scratch,
    WeightEditedError,
    merge_weight_,
    merged_weight,
    restored_weight,
    unmerge_weight_,
)
from .gradient_checkpointing import REENTRANT, REENTRANT_REMEDY, cuts_off_gradients, records_gradients
from .init import initial_factors
from .low_rank import HALF, LowRankBlock, crop, dense_delta
from .starts import start_factors
from .writer import Turn

DROPOUT_STEPS = 2**16
WITHOUT_ZERO = (False, "orthogonal")  # values of init_lora_weights with which neither factor starts as zero

Transform = Callable[[torch.Tensor], torch.Tensor]

Blocks = Mapping[str, list[LowRankBlock]]  # by weight name

NamedModules = Sequence[tuple[str, nn.Module]]  # what named_modules() yields

_CLASSES: dict[tuple[type, type], type[Swapped]] = {}  # that swapped_class made


@dataclass(frozen=True)
class LayerSpec:
    """The options of one adapted layer."""

    r: int
    alpha: float
    scaling: float  # s
    dropout: float = 0.0  # probability of dropping an input feature of the adapter
    enabled: tuple[bool, ...] | None = None  # which equal parts of a fused projection are adapted; None: all as one
    keep_float32: bool = True  # the factors stay in float32 when the model is cast to 16 bits
    init: bool | str = True  # how the factors are drawn, as LoRAConfig's init_lora_weights
    start: bool = False  # they start from the weight, and what they start as is subtracted: B @ A - B0 @ A0
    seed: int = 0  # what they are drawn from
    variant: str = ""  # one of config.VARIANTS, or plain LoRA
    rows: tuple[int, ...] = ()  # of a table of which rows are trained: their numbers, ascending


@dataclass
class LayerState:
    """What an adapted layer carries beside its parameters, as `layer.lora`."""

    spec: LayerSpec
    name: str = ""  # in the injected module
    injection: Any = None  # the record of the injection, which all layers of a model share
    custom_forward: bool = False  # the layer's class has another forward than torch's, which is run on W + delta
    dropout_override: bool | None = None  # dropout acts where gradients are recorded; None: as the training flag says
    merged: bool = False  # merge was called
    records: dict[str, RestoreRecord] = field(default_factory=dict)  # what unmerging needs, by weight name
    unfinished: bool = False  # merging or unmerging is under way, or an exception broke it off: unmerge_ completes it
    stands_in: int = 0  # forwards that run now with W + delta in place of the weight; of one thread, with the lock held
    unmergeable_reason: str = ""  # what keeps the weight from being merged, as another owner of it
    restore_failed: bool = False  # unmerging failed, so the weight is not known to be W
    rounding_reported: bool = False  # the cost of rounding W' was reported
    sharded: bool = False  # the weight was last seen sharded
    gradient_arrived: bool = False  # at B, since injection
    cut_off: bool = False  # ran in a reentrant segment that gave it no gradient
    # Memory of plain copies that are done with, by weight name, for the next merge; on the CPU alone, where fresh pages
    # take longer than the copy.
    spares: dict[str, torch.Tensor] = field(default_factory=dict)
    # Held while W + delta stands in for the weight, and while the weight is written; a copy of the layer gets another.
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("spares", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spares={}, lock=threading.RLock())


class AdaptedWeights:
    """The adapter of one layer or of one parameter (arXiv:2106.09685)."""

    KIND: str
    LOOKUP: ClassVar[bool] = False  # A is a table that rows are taken from
    lora_A: nn.Parameter  # shapes as nn/low_rank.py states for the kind
    lora_B: nn.Parameter
    lora_active: bool  # whether the adapter is applied in a forward
    lora: LayerState

    @property
    def lora_holder(self) -> nn.Module:
        """The module that holds the weights and the factors."""
        raise NotImplementedError

    def lora_holders(self) -> list[nn.Module]:
        """Return every module whose forward the adapter acts in."""
        return [self.lora_holder]

    def factor_names(self) -> tuple[str, ...]:
        """Return the names of the adapter's parameters in the holder: A and B."""
        return A, B

    def factors(self) -> tuple[nn.Parameter, ...]:
        """Return the adapter's parameters; the last one gets a gradient from the first step on."""
        return self.lora_A, self.lora_B

    def start_names(self) -> tuple[str, ...]:
        """Return the names of A0 and B0 in the holder, or none where nothing is subtracted."""
        return (START_A, START_B) if self.lora.spec.start else ()

    def stored_names(self) -> tuple[str, ...]:
        """Return the names of all that says what the adapter adds: the factors and what they started as."""
        return (*self.factor_names(), *self.start_names())

    def stored(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters of stored_names; those that they started as stay frozen."""
        if not self.lora.spec.start:
            return self.factors()
        start = (cast(nn.Parameter, self.lora_holder._parameters[name]) for name in self.start_names())
        return (*self.factors(), *start)

    def acting_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the A and B whose product is what the adapter adds: its own, or those of twice the rank."""
        if not self.lora.spec.start:
            return self.lora_A, self.lora_B
        return low_rank.acting_factors(*self.stored())

    def options_text(self) -> str:
        """Return what repr says of the adapter."""
        return f"r={self.lora.spec.r}, alpha={self.lora.spec.alpha:g}"

    def is_initial(self) -> bool:
        """Return whether the factor that starts as zero is zero still, as far as this rank sees."""
        if self.lora.spec.start:
            a, b, start_a, start_b = map(local, self.stored())
            return not a.is_meta and torch.equal(a, start_a) and torch.equal(b, start_b)
        if self.lora.spec.init in WITHOUT_ZERO:
            return not self.lora.gradient_arrived and self.lora_B.grad is None
        factor = local(self.lora_A if self.LOOKUP else self.lora_B).detach()
        return factor.numel() > 0 and not factor.is_meta and not bool(factor.any())

    def replaced_rows(self) -> tuple[int, ...]:
        """Return the rows of the weight that the adapter replaces: what they were does not matter any more."""
        return ()

    def strip_(self) -> None:
        """Give the holder back what it was, without factors and attributes; the weights stay. In place."""
        raise NotImplementedError

    def note_segment(self) -> None:
        """Note, and warn once a model, that reentrant checkpointing gives the layer no gradient."""
        if torch.is_grad_enabled() or not self.lora_holder.training or not cuts_off_gradients():
            return
        state = self.lora
        state.cut_off = True
        if not state.injection.checkpointing_reported:
            state.injection.checkpointing_reported = True
            warnings.warn(
                f"lightning_lora: {state.name!r} runs in {REENTRANT}: training does not reach the adapters in "
                f"that segment. {REENTRANT_REMEDY}.",
                stacklevel=2,
            )

    def compute_dense_weights(self, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W + delta for each of adapted_weights, differentiable in A and B; with dropout as in dense_forward."""
        self.note_segment()
        factor, factor_b = self.acting_factors()
        mask = None
        if self.drops():
            mask = F.dropout(factor.new_ones(1, factor.shape[1], *[1] * (factor.dim() - 2)), self.lora.spec.dropout)
            factor = factor * mask
        sums = {}
        for name, delta in self.deltas(factor, factor_b).items():
            weight = weights[name]
            if name not in self.lora_holder._parameters:
                raise LoRAError(
                    f"{type(self.lora_holder).__name__}: {name} is computed from others since injection; undo that."
                )
            wide = weight.to(torch.promote_types(weight.dtype, delta.dtype))
            sums[name] = self.combine(wide, delta, mask).to(weight.dtype)
        return sums

    def combine(self, weight: torch.Tensor, delta: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return W' of a W and its delta, differentiable; `mask` (1, in, 1...) is the dropout that delta has."""
        return weight + delta

    def stand_ins(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Return what stands in for each of adapted_weights in a forward that reads them, here their sums."""
        return self.compute_dense_weights(weights)

    def drops(self) -> bool:
        """Return whether dropout acts now; a user's evaluation inside a training batch records no gradients."""
        override = self.lora.dropout_override
        active = self.lora_holder.training if override is None else override and records_gradients()
        return active and self.lora.spec.dropout > 0

    def kind(self) -> str:
        """Return which of low_rank.KINDS the layer is, as far as it can tell by itself; '' without A and B."""
        return self.KIND

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter changes, by name."""
        raise NotImplementedError

    def weight_name(self, name: str, weight: str) -> str:
        """Return the name in a model of a weight of the adapter that has this name there."""
        return f"{name}.{weight}".lstrip(".")

    def own_weights(self) -> dict[str, nn.Parameter]:
        """Return adapted_weights, to be merged, and not W + delta in a forward: wait for that of another thread.

        Raises:
            LoRAError: such a forward runs in this thread.
        """
        with self.lora.lock:
            if self.lora.stands_in:
                raise LoRAError(
                    f"merge: {self.lora.name!r}: it is called inside a forward of this layer, in which W + delta "
                    "stands in for its weight; call it outside of that."
                )
            return self.adapted_weights()

    def main_weight(self) -> nn.Parameter:
        """Return the first of the adapted weights, for dtype and device."""
        return next(iter(self.adapted_weights().values()))

    def quantised(self) -> str:
        """Return how the weight is quantised, or ''; such a layer stays factored when the model is merged."""
        return ""

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the weight's values, for that of A and B."""
        return self.main_weight().dtype

    def weight_values(self) -> dict[str, torch.Tensor]:
        """Return the values of the adapted weights, detached. Collective where they are sharded."""
        return {name: full_tensor(weight) for name, weight in self.adapted_weights().items()}

    def factor_shapes(self, spec: LayerSpec | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B, by other options than the layer's own where these are given."""
        spec = spec or self.lora.spec
        return low_rank.factor_shapes(self.KIND, self._weight_shapes(), spec.r, spec.enabled)

    def low_rank_blocks(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, list[LowRankBlock]]:
        """Return what the factors add to each adapted weight, without the scaling."""
        return low_rank.low_rank_blocks(self.KIND, self._weight_shapes(), factor_a, factor_b, self.lora.spec.enabled)

    def _weight_shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.adapted_weights().items()}

    def create_factors(self, dtype: torch.dtype) -> None:
        """Register the factors with their initial values, and these where they are subtracted."""
        device = self.main_weight().device
        if self.lora.spec.start and self.lora.injection.values_follow:
            drawn: tuple[torch.Tensor, ...] = tuple(torch.zeros(shape) for shape in self.factor_shapes())
        else:
            drawn = self.drawn_factors()
        for name, values in zip(self.factor_names(), drawn, strict=True):
            self.lora_holder.register_parameter(name, nn.Parameter(values.to(device, dtype)))
        for name, factor in zip(self.start_names(), self.factors(), strict=False):
            self.lora_holder.register_parameter(name, nn.Parameter(factor.detach().clone(), requires_grad=False))

    def shapes_by(self, spec: LayerSpec) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Return A, B and what they started as, each with the shape that it has by other options."""
        start = self.stored()[len(self.factors()) :]
        shapes = self.factor_shapes(spec)
        return list(zip((self.lora_A, self.lora_B, *start), (*shapes, *shapes), strict=False))

    def take_spec_(self, spec: LayerSpec) -> None:
        """Take another rank and scaling. The parameters stay the same; of another rank, they lose their values."""
        for factor, shape in self.shapes_by(spec):
            if factor.shape != shape:
                factor.data, factor.grad = factor.detach().new_empty(shape), None
        self.lora.spec = spec

    def drawn_factors(self) -> tuple[torch.Tensor, ...]:
        """Return the initial values of the factors, the same each time."""
        spec = self.lora.spec
        if is_start(spec.init):
            return self._factors_from_weight()
        return initial_factors(*self.factor_shapes(), spec.init, spec.seed, lookup=self.LOOKUP)

    def _factors_from_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec, weights = self.lora.spec, self.weight_values()
        try:
            pairs = [
                start_factors(part, spec.r, spec.scaling, str(spec.init), spec.seed)
                for part in low_rank.adapted_parts(self.KIND, weights, spec.enabled)
            ]
        except LoRAError as error:
            raise LoRAError(f"{self.lora.name!r}: {error}.") from None
        joined = low_rank.join_parts(self.KIND, weights, pairs)
        shape_a, shape_b = self.factor_shapes()
        return joined[0].reshape(shape_a), joined[1].reshape(shape_b)

    def draw_(self) -> None:
        """Let the factors, and what they started as, have their initial values. In place."""
        drawn = self.drawn_factors()
        for factor, values in zip(self.stored(), (*drawn, *drawn), strict=False):
            copy_(factor, values)

    def local_blocks(
        self, weights: Mapping[str, torch.Tensor], *factors: torch.Tensor
    ) -> dict[str, list[LowRankBlock]]:
        """Return what is added to this rank's shards of these weights. Collective where the factors are sharded.

        Args:
            weights: by name.
            factors: values of stored_names.
        """
        factor_a, factor_b = low_rank.acting_factors(*map(full_tensor, factors))
        blocks = self.low_rank_blocks(factor_a, factor_b)
        return {name: self.crop_to_shard(blocks[name], weights[name]) for name in blocks}

    def whole_blocks(self, *stored: torch.Tensor) -> list[LowRankBlock]:
        """Return what the values of stored_names add to the adapted weights, without the scaling; magnitudes apart.

        Collective where they are sharded.
        """
        a, b, *others = map(full_tensor, stored)
        blocks = self.low_rank_blocks(*low_rank.acting_factors(a, b, *(others if self.lora.spec.start else ())))
        return [block for of_weight in blocks.values() for block in of_weight]

    def crop_to_shard(self, blocks: list[LowRankBlock], weight: torch.Tensor) -> list[LowRankBlock]:
        """Return the parts of a weight's blocks that fall on this rank's shard of it."""
        if not is_sharded(weight):
            return blocks
        rows, columns, *kernel = window(weight)
        if any(part != slice(0, size) for part, size in zip(kernel, weight.shape[2:], strict=True)):
            raise LoRAError(
                f"a weight of shape {tuple(weight.shape)} cannot be merged while it is sharded beyond dim 1"
            )
        width = weight.shape[2:].numel()
        return crop(blocks, rows, slice(columns.start * width, columns.stop * width))

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of a weight whose first dimension is that of the blocks' rows."""
        return weight

    def deltas(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return s * B @ A in each weight's shape and the factors' dtype, differentiable."""
        shapes = self._weight_shapes()
        return {
            name: dense_delta(blocks, shapes[name]) * self.lora.spec.scaling
            for name, blocks in self.low_rank_blocks(factor_a, factor_b).items()
        }

    def starts_from(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Return whether a state dict brings another weight for an untrained adapter to start from, and no factors.

        A sharded weight is not gathered for that: the adapter goes on from where it started, and W' is W all the same.
        """
        if not is_start(self.lora.spec.init) or is_sharded(self.main_weight()) or not self.is_initial():
            return False
        stored = dict(zip(self.stored_names(), self.stored(), strict=True))
        new = any(prefix + name in state_dict for name in self.adapted_weights())
        return new and all(state_dict.get(prefix + name, live) is live for name, live in stored.items())

    def unmergeable_reason(self) -> str:
        """Return why merging would be wrong for this layer, or ''."""
        return self.lora.unmergeable_reason

    def merge_(
        self,
        *,
        copy: bool,
        observe: Observer | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        blocks: Blocks | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Write W' into this rank's shard of each weight, see merge_weight_.

        `weights` are adapted_weights' and `blocks` local_blocks', where the caller has them.
        """
        state = self.lora
        with state.lock:
            if state.unfinished:
                self.unmerge_()
            weights = weights or self.own_weights()
            blocks = blocks or self.local_blocks(weights, *self.stored())
            try:
                state.unfinished = True
                for name in blocks:
                    if name not in state.records:
                        weight = self.as_matrix(local(weights[name]))
                        scaling, spare = state.spec.scaling, state.spares.pop(name, None)
                        merge_weight_(
                            weight,
                            blocks[name],
                            scaling,
                            copy=copy,
                            spare=spare,
                            observe=observe,
                            scratch=scratch,
                            hold=partial(state.records.__setitem__, name),
                        )
            except BaseException:
                self.unmerge_()
                raise
            vars(self)["lora_active"], state.merged = False, True  # nn.Module's __setattr__ takes many times as long
            state.unfinished = False

    def unmerge_(self) -> None:
        """Write W back into this rank's shard of each weight, see unmerge_weight_; another call completes it."""
        failure, state = None, self.lora
        with state.lock:
            weights, state.unfinished = self.adapted_weights(), True
            for name, record in list(state.records.items()):
                try:
                    unmerge_weight_(self.as_matrix(local(weights[name])), record)
                except LoRAError as error:
                    failure = error
                    state.restore_failed = state.restore_failed or not isinstance(error, WeightEditedError)
                del state.records[name]
                if record.copy is not None and record.copy.device.type == "cpu":
                    state.spares[name] = record.copy
            vars(self)["lora_active"], state.merged = True, False
            state.unfinished = False
        if failure:
            raise failure

    @contextmanager
    def briefly_unmerged(self) -> Iterator[None]:
        """Unmerge inside, so that what changes a weight there (a move, a cast, a load) changes W."""
        if not self.lora.records:
            yield
            return
        copy = any(record.copy is not None for record in self.lora.records.values())
        self.unmerge_()
        yield
        if self.unmergeable_reason():  # tables that are not tied any more
            self.lora.merged = True
            return
        try:
            self.merge_(copy=copy)
        except LoRAError as error:
            raise LoRAError(
                f"{self.lora.name!r}: was merged when it was cast, moved or loaded into; now {error}. It is unmerged, "
                "others may be merged still: call unmerge(model), then repeat or undo the change."
            ) from error

    def original(self, name: str) -> torch.Tensor:
        """Return a parameter as it is without the adapter, detached: live, or a restored copy while merged."""
        with self.lora.lock:  # W, and not what stands in for it in another thread's forward, or is half merged
            weight: torch.Tensor = getattr(self.lora_holder, name).detach()
            if self.lora.restore_failed and name in self.adapted_weights():
                raise LoRAError(
                    f"{type(self.lora_holder).__name__}: its base weight could not be restored after merging, so "
                    "nothing is saved from it; load the base weights again."
                )
            record = self.lora.records.get(name)
            if record is None:
                return weight
            shard = local(weight)
            return from_local_like(restored_weight(self.as_matrix(shard), record).view(shard.shape), weight)

    def base_values(self, name: str) -> torch.Tensor:
        """Return this rank's shard of a weight without the adapter, detached; of a quantised one its values."""
        return local(self.original(name))

    def portable_state(self) -> LayerState:
        """Return the state with plain copies for restoring, because another machine may compute other last bits."""
        records = {name: RestoreRecord([], copy=self.as_matrix(self.original(name))) for name in self.lora.records}
        return replace(self.lora, records=records)

    def merged_copies(self, weights: Mapping[str, torch.Tensor], blocks: Blocks) -> dict[str, torch.Tensor]:
        """Return W' of each adapted weight for the given W and local blocks, as new tensors, sharded as W is."""
        merged = {}
        for name in blocks:
            shard = local(weights[name])
            values = merged_weight(self.as_matrix(shard), blocks[name], self.lora.spec.scaling).view(shard.shape)
            merged[name] = from_local_like(values, weights[name])
        return merged


class Swapped(nn.Module):
    """A module whose class was replaced by a subclass of it.

    fully_shard in turn subclasses the class that it finds; such a module is rebuilt, or not, as torch decides.
    """

    lora_mixin: ClassVar[type[Swapped]]  # the two classes that the subclass combines
    lora_base: ClassVar[type[nn.Module]]
    # torch's compiler looks whether a weight is stood in for while it traces; torch.export of torch 2.6 would not.
    torchdynamo_force_dynamic: ClassVar[bool] = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        swapped = type(self) is swapped_class(self.lora_mixin, self.lora_base)
        if swapped and make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *state)
        return (make, args, *state)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """Return the one subclass of a pair of mixin and base class, called as the base: programs go by a class's name."""
    if (mixin, base) not in _CLASSES:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        attributes = {**names, "lora_mixin": mixin, "lora_base": base}
        _CLASSES.setdefault((mixin, base), type(base.__name__, (mixin, base), attributes))
    return _CLASSES[mixin, base]


class AdaptedModule(Swapped):
    """A module that holds adapted weights: an adapted layer, or one of whose parameters some are adapted."""

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        """Return what is adapted here, by the parameter's name, or under "" where the whole layer is."""
        raise NotImplementedError

    def lora_adapter_of(self, weight: str) -> AdaptedWeights | None:
        """Return the adapter that changes a parameter of the module, or None."""
        return next((each for each in self.lora_adapters().values() if weight in each.adapted_weights()), None)

    def lora_place(self, values: Mapping[str, Any]) -> None:
        """Let values stand in for parameters, or put these back."""
        self._parameters.update(values)

    def extra_repr(self) -> str:
        """Return what the module shows of itself, and r and alpha of what is adapted."""
        adapters = self.lora_adapters().items()
        options = (f"{name}{': ' if name else ''}{adapter.options_text()}" for name, adapter in adapters)
        return ", ".join(filter(None, [super().extra_repr(), *options]))

    def _apply(self, fn: Transform, recurse: bool = True) -> Any:
        adapters = list(self.lora_adapters().values())
        were_meta = [adapter for adapter in adapters if adapter.factors()[0].is_meta]
        with self._lora_briefly_unmerged("cast or move"):
            super()._apply(_keeping_float32(fn, adapters), recurse)  # type: ignore[no-untyped-call]
        for adapter in were_meta:
            if not adapter.factors()[0].is_meta:  # to_empty
                if is_start(adapter.lora.spec.init):
                    raise LoRAError(
                        f"{adapter.lora.name!r}: its adapter starts from the weight, which has no values after "
                        "to_empty; inject after the weights are loaded."
                    )
                adapter.draw_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        adapters = self.lora_adapters().values()
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(adapter.lora.lock)  # W, and not what stands in for it in another thread's forward
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for adapter in adapters:
                if adapter.lora.records or adapter.lora.restore_failed:
                    destination.update({prefix + name: adapter.original(name) for name in adapter.adapted_weights()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self._lora_briefly_unmerged():
            starting = [each for each in self.lora_adapters().values() if each.starts_from(state_dict, prefix)]
            super()._load_from_state_dict(state_dict, prefix, *args)
            for adapter in starting:
                adapter.draw_()
            for adapter in self.lora_adapters().values():
                absent = any(prefix + name not in state_dict for name in adapter.adapted_weights())
                adapter.lora.restore_failed = adapter.lora.restore_failed and absent

    @contextmanager
    def _lora_briefly_unmerged(self, verb: str = "load_state_dict") -> Iterator[None]:
        adapters = self.lora_adapters().values()
        with ExitStack() as stack:
            stack.enter_context(take_turn(adapters, verb))
            for adapter in adapters:
                stack.enter_context(adapter.briefly_unmerged())
            yield

    def __prepare_scriptable__(self) -> Any:
        """Refuse TorchScript, which calls this first, and would end in an error of its own about annotations."""
        name = next(iter(self.lora_adapters().values())).lora.name
        raise LoRAError(
            f"torch.jit.script: {name!r} is an adapted {self.lora_base.__name__}, which TorchScript cannot "
            "compile. Call merge_and_unload(model) first, on a copy (copy.deepcopy) if the adapter is still needed; "
            "or trace the model (torch.jit.trace, to_torchscript(method='trace'))."
        )


class LoRALayer(AdaptedWeights, AdaptedModule):
    """An adapted layer (arXiv:2106.09685): a subclass for each kind is mixed in front of the layer's own class."""

    KNOWN_FORWARD: ClassVar[tuple[str, ...]] = ("forward",)
    weight: nn.Parameter

    @classmethod
    def problem(cls, module: nn.Module) -> str:
        """Return why the class cannot adapt a module of its kind, or ''."""
        return ""

    @property
    def lora_holder(self) -> nn.Module:
        return self

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        return {"": self}

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        weight = self._parameters.get("weight")  # nn.Module's __getattr__ takes several times as long
        return {"weight": self.weight if weight is None else weight}

    def factors(self) -> tuple[nn.Parameter, ...]:
        parameters = self._parameters
        a, b = parameters.get(A), parameters.get(B)
        return (self.lora_A, self.lora_B) if a is None or b is None else (a, b)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        if self.lora.custom_forward:
            return self.dense_forward(*args, **kwargs)
        self.note_segment()
        return self.factored_forward(*args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the layer had before it was adapted."""
        return super().forward(*args, **kwargs)

    def factored_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) + s * B(A(dropout(x))), without ever building B @ A."""
        raise NotImplementedError

    def is_cheaper_dense(self) -> bool:
        """Return whether factored_forward runs on W + delta, because that costs less."""
        return False

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base's outputs without the bias."""
        raise NotImplementedError

    def low_rank_product(self, x: torch.Tensor) -> torch.Tensor:
        """Return B(A(x)), without the scaling."""
        raise NotImplementedError

    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run base_forward on W + delta, differentiable in A and B.

        Dropout acts on whole input features, the same for the batch, because the input is out of reach here.
        """
        with self.dense_weight():
            return super().forward(*args, **kwargs)

    def dense_weight(self) -> StandIns:
        """Let W + delta stand in for each adapted weight inside, for code that reads it; one thread at a time."""
        return StandIns(self, [self])

    def dropped(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the adapter's input after dropout, and the scaling that goes with it."""
        spec = self.lora.spec
        x, factor = drop(x, spec.dropout) if self.drops() else (x, 1.0)
        return x, spec.scaling * factor

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as nn.Module does; parallelize_module comes here with each sharded one."""
        if names_factor(name) and is_sharded(param):
            from ..distributed.tensor_parallel import place_like_weight  # imports much, and is rarely needed

            if self.lora.spec.enabled is not None:
                raise LoRAError(
                    f"{type(self).__name__}: the parts of enable_lora do not follow a tensor parallel split; adapt the "
                    "layer as a whole, or leave it out of the parallelize plan."
                )
            dims = low_rank.shard_dims(self.KIND)
            placed_as = {START_A: A, START_B: B}.get(name, name)
            param = place_like_weight(placed_as, cast(nn.Parameter, param), self.main_weight(), dims)
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = super().__reduce_ex__(protocol)
        if self.lora.records and isinstance(state[0], dict):
            state[0] = state[0] | {"lora": self.portable_state()}
        return (make, args, *state)

    def strip_(self) -> None:
        stored = self.stored_names()
        self.__class__ = class_before_swap(self)  # type: ignore[assignment]
        for name in stored:
            self._parameters.pop(name, None)
        for name in [name for name in vars(self) if name == "lora" or name.startswith("lora_")]:
            delattr(self, name)


class StandIns:
    """Let W + delta stand in for adapted weights inside; a class, as torch 2.6 cannot trace a generator's context."""

    def __init__(self, module: AdaptedModule, adapters: Sequence[AdaptedWeights]) -> None:
        self.module, self.adapters = module, adapters
        self.states = [] if torch.compiler.is_compiling() else [each.lora for each in adapters]  # it traces one thread

    def __enter__(self) -> None:
        for state in self.states:
            state.lock.acquire()
        try:
            # Another thread may have merged them meanwhile.
            adapters = [each for each in self.adapters if each.lora_active] if self.states else self.adapters
            names = [name for adapter in adapters for name in adapter.adapted_weights()]
            self.weights = {name: getattr(self.module, name) for name in names}
            values: dict[str, Any] = {}
            for adapter in adapters:
                values.update(adapter.stand_ins(self.weights))
        except BaseException:
            for state in self.states:
                state.lock.release()
            raise
        for state in self.states:
            state.stands_in += 1
        self.module.lora_place(values)

    def __exit__(self, *exception: object) -> None:
        self.module.lora_place(self.weights)
        for state in self.states:
            state.stands_in -= 1
            state.lock.release()


def adapted_places(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> Iterator[tuple[str, nn.Module, AdaptedWeights]]:
    """Yield what is adapted in a model: name, module and adapter. One that acts in several modules comes for each."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate) if modules is None else modules:
        if isinstance(module, AdaptedModule):
            for parameter, adapter in module.lora_adapters().items():
                name = canonical(path)
                yield f"{name}.{parameter}" if name and parameter else name or parameter, module, adapter


def adapted_layers(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> dict[str, AdaptedWeights]:
    """Return the adapters of layers and parameters of a model, by name; a shared one under its first, or under each.

    `modules` are those of the model, where the caller has listed them.
    """
    first: dict[AdaptedWeights, str] = {}
    places = adapted_places(model, remove_duplicate=remove_duplicate, modules=modules)
    return {name: each for name, _, each in places if first.setdefault(each, name) == name or not remove_duplicate}


def take_turn(adapters: Collection[AdaptedWeights], verb: str) -> Turn:
    """Return the turn, for a `with` block, at changing the models that adapters are in."""
    records = {id(record): record for record in [each.lora.injection for each in adapters]}
    return Turn(verb, [record.writer for record in records.values()])


@contextmanager
def active_as(layers: Collection[AdaptedWeights], active: bool) -> Iterator[None]:
    """Let forwards apply these adapters inside, or pass over all of them; outside each is as it was found."""
    before = [layer.lora_active for layer in layers]
    try:
        for layer in layers:
            layer.lora_active = active
        yield
    finally:
        for layer, was_active in zip(layers, before, strict=True):
            layer.lora_active = was_active


def layer_adapter(module: object) -> AdaptedWeights | None:
    """Return the adapter of a module that is adapted as a whole, else None."""
    return module.lora_adapters().get("") if isinstance(module, AdaptedModule) else None


def is_factor(name: str, module: nn.Module) -> bool:
    """Return whether a state name of a module is that of a factor."""
    return isinstance(module, AdaptedModule) and names_factor(name)


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Zero each element of x with probability p; return that and the factor that keeps its expectation.

    On the CPU, torch's own dropout takes many times as long as the adapter's products. Here 16 random bits decide each
    element: p is taken to the nearest 1/65536, and the factor belongs to that p, so nothing is biased.
    """
    if x.device.type != "cpu" or is_sharded(x):
        return F.dropout(x, p), 1.0
    steps = min(max(round(p * DROPOUT_STEPS), 1), DROPOUT_STEPS - 1)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64, device=x.device)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(bits < steps - DROPOUT_STEPS // 2, 0), DROPOUT_STEPS / (DROPOUT_STEPS - steps)


def _keeping_float32(fn: Transform, adapters: Iterable[AdaptedWeights]) -> Transform:
    """fn, but for casting the factors to 16 bits: they train in float32 while they compute in the layer's dtype."""
    kept = [adapter for adapter in adapters if adapter.lora.spec.keep_float32]
    factors = {id(t) for each in kept for p in each.stored() for t in (p, p.grad) if t is not None}

    def without_narrowing(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        narrows = moved.dtype in HALF and tensor.dtype not in HALF
        return tensor.to(moved.device) if narrows and id(tensor) in factors else moved

    return without_narrowing if kept else fn


def class_before_swap(module: Swapped) -> type[nn.Module]:
    """Return the class that a module had, or one like its own without the mixin, where fully_shard made that."""
    swapped, base = swapped_class(module.lora_mixin, module.lora_base), module.lora_base
    if type(module) is swapped:
        return base
    bases = tuple(base if parent is swapped else parent for parent in type(module).__bases__)
    attributes = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__, bases, attributes)


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)
