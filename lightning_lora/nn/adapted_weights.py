"""The adapter of one layer or one parameter: its options and state, its stored tensors, and how they are merged.

What the stored tensors mean, its variant says (nn/variant.py).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import copy_, from_local_like, full_tensor, is_sharded, local, window
from ..errors import LoRAError
from ..names import canonical
from . import low_rank
from .adapted_module import AdaptedModule
from .exact_merge import (
    Observer,
    RestoreRecord,
    Scratch,
    WeightEditedError,
    merge_weight_,
    merged_weight,
    parts_of,
    restored_weight,
    unmerge_weight_,
)
from .gradient_checkpointing import REENTRANT, REENTRANT_REMEDY, cuts_off_gradients, records_gradients
from .low_rank import LowRankBlock, crop, dense_delta
from .shared_tensors import SharedTensors
from .variant import Acting, Place, Stored, Variant

Blocks = Mapping[str, list[LowRankBlock]]  # by weight name

NamedModules = Sequence[tuple[str, nn.Module]]  # what named_modules() yields


@dataclass(frozen=True)
class LayerSpec:
    """The options of one adapted layer."""

    r: int
    alpha: float
    scaling: float  # s
    variant: Variant  # what is stored, and what that adds
    dropout: float = 0.0  # probability of dropping an input feature of the adapter
    enabled: tuple[bool, ...] | None = None  # which equal parts of a fused projection are adapted; None: all as one
    keep_float32: bool = True  # the factors stay in float32 when the model is cast to 16 bits
    init: bool | str = True  # how the factors are drawn, as LoRAConfig's init_lora_weights
    seed: int = 0  # what they are drawn from
    rows: tuple[int, ...] = ()  # of a table of which rows are trained: their numbers, ascending
    options: Mapping[str, Any] = field(default_factory=dict)  # those that the variant alone has, by name


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
    gradient_arrived: bool = False  # at the last of the factors, since injection
    cut_off: bool = False  # ran in a reentrant segment that gave it no gradient
    shared: SharedTensors | None = None  # what all layers of a model share, where the variant has such tensors
    placed: tuple[LayerSpec, Place] | None = None  # what `place` returned last
    # Memory of plain copies that are done with, by weight name, for the next merge; on the CPU alone, where fresh pages
    # take longer than the copy.
    spares: dict[str, torch.Tensor] = field(default_factory=dict)
    # Held while W + delta stands in for the weight, and while the weight is written; a copy of the layer gets another.
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("spares", "lock", "placed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spares={}, lock=threading.RLock(), placed=None)


class StoredTensors:
    """The stored tensors of one layer's adapter: where they lie, what shapes they have, how they start."""

    KIND: str
    lora_A: nn.Parameter  # of plain LoRA and variants that go on from it
    lora_B: nn.Parameter
    LOOKUP: ClassVar[bool] = False  # A is a table that rows are taken from
    lora: LayerState

    @property
    def lora_holder(self) -> nn.Module:
        """The module that holds the weights and the stored tensors."""
        raise NotImplementedError

    def lora_holders(self) -> list[nn.Module]:
        """Return every module whose forward the adapter acts in."""
        return [self.lora_holder]

    def options_text(self) -> str:
        """Return what repr says of the adapter."""
        spec = self.lora.spec
        return f"r={spec.r}, alpha={spec.alpha:g}" if spec.variant.scaled else f"r={spec.r}"

    def stored(self, leaves: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        """Return all that says what the adapter adds, or the tensors of these leaf names, by leaf name."""
        holder = self.lora_holder
        return {leaf: getattr(holder, self.stored_name(leaf)) for leaf in leaves or self.lora.spec.variant.leaves}

    def stored_name(self, leaf: str) -> str:
        """Return the name of a stored tensor in the holder."""
        return leaf

    def stored_names(self) -> list[str]:
        """Return the names of all stored tensors in the holder."""
        return [self.stored_name(leaf) for leaf in self.lora.spec.variant.leaves]

    def stored_in(self, state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """Return the values that a state dict has for the stored tensors, by leaf name."""
        return {leaf: state[prefix + self.stored_name(leaf)] for leaf in self.lora.spec.variant.leaves}

    def replaced_rows(self) -> tuple[int, ...]:
        """Return the rows of the weight that the adapter replaces: what they were does not matter any more."""
        return self.lora.spec.rows

    def factors(self) -> tuple[nn.Parameter, ...]:
        """Return the trained parameters; the last one gets a gradient from the first step on."""
        return tuple(self.stored(self.lora.spec.variant.trained).values())

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter changes, by name."""
        raise NotImplementedError

    def main_weight(self) -> nn.Parameter:
        """Return the first of the adapted weights, for dtype and device."""
        return next(iter(self.adapted_weights().values()))

    def weight_name(self, name: str, weight: str) -> str:
        """Return the name in a model of a weight of the adapter that has this name there."""
        return f"{name}.{weight}".lstrip(".")

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the weight's values, for that of the stored tensors."""
        return self.main_weight().dtype

    def weight_values(self) -> Mapping[str, torch.Tensor]:
        """Return the values of the adapted weights, detached; sharded ones stay sharded."""
        return {name: weight.detach() for name, weight in self.adapted_weights().items()}

    def weight_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the adapted weights, by name."""
        return {name: weight.shape for name, weight in self.adapted_weights().items()}

    def kind(self) -> str:
        """Return which of low_rank.KINDS the layer is, as far as it can tell by itself; '' for a table with rows."""
        return self.KIND

    def place(self, spec: LayerSpec | None = None) -> Place:
        """Return the layer as its variant sees it, by other options than its own where these are given."""
        spec, known = spec or self.lora.spec, self.lora.placed
        if known is not None and known[0] is spec and known[1].name == self.lora.name:
            return known[1]
        options = spec.r, spec.scaling, spec.enabled, spec.init, spec.seed, spec.rows, spec.options
        place = Place(self.lora.name, self.KIND, self.weight_shapes(), *options)
        if spec is self.lora.spec:
            self.lora.placed = spec, place
        return place

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Return what the stored tensors start as, the same each time. Collective where W is sharded and read."""
        return self.lora.spec.variant.start(self.place(), self.weight_values)

    def create_(self, dtype: torch.dtype) -> None:
        """Register the stored tensors with their initial values, without those that layers share. In place."""
        variant, device = self.lora.spec.variant, self.main_weight().device
        if variant.started and self.lora.injection.values_follow:
            values = {leaf: torch.zeros(shape) for leaf, shape in variant.shapes(self.place()).items()}
        else:
            values = self.initial_values()
        for leaf in (*variant.trained, *variant.frozen):
            tensor, trained = values[leaf].to(device, dtype), leaf in variant.trained
            parameter = nn.Parameter(tensor if trained else tensor.clone(), requires_grad=trained)
            for holder in self.lora_holders():
                holder.register_parameter(self.stored_name(leaf), parameter)

    def draw_(self, leaves: Collection[str] | None = None) -> None:
        """Let the stored tensors, or these of them, have their initial values. In place. Collective as they are."""
        stored = self.stored()
        for leaf, values in self.initial_values().items():
            if leaves is None or leaf in leaves:
                copy_(stored[leaf], values.to(stored[leaf].dtype))
        if leaves is None and self.lora.shared is not None:
            self.lora.shared.draw_(self.lora.spec.r)

    def is_initial(self) -> bool:
        """Return whether nothing was trained yet, as far as this rank sees."""
        stored = {leaf: local(tensor) for leaf, tensor in self.stored().items()}
        known = self.lora.spec.variant.is_initial(stored, self.place())
        if known is None:
            return not self.lora.gradient_arrived and self.factors()[-1].grad is None
        return known

    def followers(self, state_dict: Mapping[str, Any], prefix: str) -> Collection[str]:
        """Return the leaf names of tensors that follow the new weight that a state dict brings.

        They started from the weight, are as they started, and are not in the state dict. Collective where W is sharded.
        """
        variant = self.lora.spec.variant
        if not variant.follows_weight or not any(prefix + name in state_dict for name in self.adapted_weights()):
            return ()
        stored = self.stored()
        names = {leaf: prefix + self.stored_name(leaf) for leaf in stored}
        kept = [leaf for leaf, live in stored.items() if state_dict.get(names[leaf], live) is live]
        return variant.followers(kept, stored, self.place(), self.weight_values)

    def shapes_by(self, spec: LayerSpec) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Return the stored tensors, each with the shape that it has by other options, which all layers take."""
        stored, shapes = self.stored(), dict(self.lora.spec.variant.shapes(self.place(spec)))
        if self.lora.shared is not None:
            shapes |= self.lora.shared.shapes(spec.r)
        return [(stored[leaf], shape) for leaf, shape in shapes.items()]

    def take_spec_(self, spec: LayerSpec) -> None:
        """Take another rank and scaling. The parameters stay the same; of another rank, they lose their values."""
        for factor, shape in self.shapes_by(spec):
            if factor.shape != shape:
                factor.data, factor.grad = factor.detach().new_empty(shape), None
        self.lora.spec = spec

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None], *, loaded: bool) -> None:
        """Tie again what other modules shared with `module`, where torch made a parameter for each. In place.

        Args:
            module: one of the holders.
            before: its parameters before torch replaced some of them.
            loaded: by load_state_dict(assign=True), else by a move or to_empty.
        """
        if self.lora.shared is not None:
            self.lora.shared.tie_again_(module, before)


class AdaptedWeights(StoredTensors):
    """The adapter of one layer or of one parameter, and the weights that it changes."""

    TRANSIENT: ClassVar[tuple[str, ...]] = ()  # attributes that a copy goes without
    lora_active: bool  # whether the adapter is applied in a forward

    def strip_(self) -> None:
        """Give the holders back what they were, without stored tensors and attributes; the weights stay. In place."""
        for holder in self.lora_holders():
            for leaf in self.lora.spec.variant.leaves:
                holder._parameters.pop(self.stored_name(leaf), None)
        for holder in self.lora_holders():
            if isinstance(holder, AdaptedModule):
                holder.lora_take_out(self)

    def __getstate__(self) -> Any:
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10 has none of object's
        state = inherited() if inherited is not None else vars(self)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in self.TRANSIENT}
            if self.lora.records:
                state["lora"] = _portable_state(self)
        return state

    # --- in a forward ---

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

    def acting(self) -> Acting:
        """Return what the stored tensors act as now, differentiable."""
        spec = self.lora.spec
        weight = _matrix(self) if spec.variant.reads_weight else None
        acting = spec.variant.acting(_seen_part(self, self.stored()), weight, spec.scaling)
        return acting if type(acting) is Acting else Acting(*acting)

    def stand_ins(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Return what stands in for each of adapted_weights in a forward that reads them, here their sums."""
        return self.dense_weights(weights)

    def dense_weights(self, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W' for each of adapted_weights, differentiable in what is trained.

        Dropout acts on whole input features, the same for the batch, because the input is out of reach here.
        """
        self.note_segment()
        a, b, scale = self.acting()
        mask = None
        if self.drops():
            mask = F.dropout(a.new_ones(1, a.shape[1], *[1] * (a.dim() - 2)), self.lora.spec.dropout)
            a = a * mask
        sums = {}
        for name, delta in self.deltas(a, b).items():
            weight = weights[name]
            if name not in self.lora_holder._parameters:
                raise LoRAError(
                    f"{type(self.lora_holder).__name__}: {name} is computed from others since injection; undo that."
                )
            wide = weight.to(torch.promote_types(weight.dtype, delta.dtype))
            sums[name] = self.combine(wide, delta, scale, mask).to(weight.dtype)
        return sums

    def deltas(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return s * B @ A in each weight's shape and the factors' dtype, differentiable."""
        place = self.place()
        blocks = place.low_rank_blocks(a, b)
        return {name: dense_delta(blocks[name], place.shapes[name]) * self.lora.spec.scaling for name in blocks}

    def combine(
        self, weight: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return W' of a W and its delta, differentiable; `mask` (1, in, 1...) is the dropout that delta has."""
        sums = weight + delta
        return sums if scale is None else sums * over_weight(scale, weight, self.KIND).to(sums.dtype)

    def drops(self) -> bool:
        """Return whether dropout acts now; a user's evaluation inside a training batch records no gradients."""
        override = self.lora.dropout_override
        active = self.lora_holder.training if override is None else override and records_gradients()
        return active and self.lora.spec.dropout > 0

    # --- merging ---

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

    def quantised(self) -> str:
        """Return how the weight is quantised, or ''; such a layer stays factored when the model is merged."""
        return ""

    def unmergeable_reason(self) -> str:
        """Return why merging would be wrong for this layer, or ''."""
        return self.lora.unmergeable_reason

    def blocks(self, weights: Mapping[str, torch.Tensor], stored: Stored | None = None) -> Blocks:
        """Return what is added to this rank's shards of these weights. Collective where the values are sharded.

        Args:
            weights: by name; the live ones, or those of a state dict.
            stored: by leaf name, in place of the live values.
        """
        whole = {leaf: full_tensor(tensor) for leaf, tensor in (stored or self.stored()).items()}
        blocks = self.lora.spec.variant.blocks(whole, self.place(), lambda name: parts_of(full_tensor(weights[name])))
        return {name: self.crop_to_shard(blocks[name], weights[name]) for name in blocks}

    def update_blocks(self, stored: Stored | None = None) -> Blocks:
        """Return what is added to the whole weights, without s and without a scale. Collective as `blocks`."""
        whole = {leaf: full_tensor(tensor) for leaf, tensor in (stored or self.stored()).items()}
        a, b, _ = self.lora.spec.variant.acting(_seen_part(self, whole), None, self.lora.spec.scaling)
        return self.place().low_rank_blocks(a, b)

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

    def weight_changed(self) -> None:
        """Forget what was computed from the weight: it was moved, cast or loaded."""

    def before_merge(self) -> None:
        """Note that the weight, which is W, is about to be written to."""

    def after_unmerge(self) -> None:
        """Note that the weight has the bits again that it had at before_merge."""

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

        `weights` are adapted_weights' and `blocks` those of `blocks`, where the caller has them.
        """
        state = self.lora
        with state.lock:
            if state.unfinished:
                self.unmerge_()
            weights = weights or self.own_weights()
            blocks = blocks or self.blocks(weights)
            try:
                state.unfinished = True
                if not state.records:
                    self.before_merge()
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
            if failure is None:
                self.after_unmerge()
            else:
                self.weight_changed()
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

    def merged_copies(self, weights: Mapping[str, torch.Tensor], blocks: Blocks) -> dict[str, torch.Tensor]:
        """Return W' of each adapted weight for the given W and local blocks, as new tensors, sharded as W is."""
        merged = {}
        for name in blocks:
            shard = local(weights[name])
            values = merged_weight(self.as_matrix(shard), blocks[name], self.lora.spec.scaling).view(shard.shape)
            merged[name] = from_local_like(values, weights[name])
        return merged


def _seen_part(layer: AdaptedWeights, stored: Stored) -> Stored:
    """Return what a layer sees of its stored tensors, of which other layers may share some."""
    variant = layer.lora.spec.variant
    return variant.of_layer(stored, layer.place()) if variant.shared else stored


def _matrix(layer: AdaptedWeights) -> torch.Tensor | None:
    """Return W as (out, in), or None where there are several."""
    weights = list(layer.adapted_weights().values())
    if len(weights) > 1:
        return None
    return weights[0].T if layer.KIND in low_rank.TRANSPOSED else weights[0].flatten(1)


def _portable_state(layer: AdaptedWeights) -> LayerState:
    """Return the state with plain copies for restoring, because another machine may compute other last bits."""
    copies = {name: layer.as_matrix(layer.original(name)) for name in layer.lora.records}
    return replace(layer.lora, records={name: RestoreRecord([], copy=copy) for name, copy in copies.items()})


def over_weight(values: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return values (out,) in the shape in which they broadcast with a weight."""
    return values.view(1, -1) if kind in low_rank.TRANSPOSED else values.view(-1, *[1] * (weight.dim() - 1))


def share_tensors_(layers: Collection[AdaptedWeights], seed: int) -> None:
    """Register in each layer what its variant shares in the model, large enough for all of them. In place.

    Args:
        layers: all adapted layers of a model, some perhaps adapted earlier.
        seed: what the tensors are drawn from.
    """
    sharing = [layer for layer in layers if layer.lora.spec.variant.shared]
    if not sharing:
        return
    shared = next((layer.lora.shared for layer in sharing if layer.lora.shared is not None), None)
    if shared is None:
        shared = SharedTensors(sharing[0].lora.spec.variant.start_shared, seed)
    shared.fit_([layer.place() for layer in sharing], sharing[0].factors()[0])
    for layer in sharing:
        if layer.lora.shared is None:
            layer.lora.shared = shared
            for leaf, parameter in shared.parameters.items():
                layer.lora_holder.register_parameter(layer.stored_name(leaf), parameter)


def adapted_places(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> Iterator[tuple[str, nn.Module, AdaptedWeights]]:
    """Yield what is adapted in a model: name, module and adapter. One that acts in several modules comes for each."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate) if modules is None else modules:
        if isinstance(module, AdaptedModule):
            for parameter, adapter in module.lora_adapters().items():
                yield ".".join(part for part in (canonical(path), parameter) if part), module, adapter  # type: ignore[misc]


def adapted_layers(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> dict[str, AdaptedWeights]:
    """Return the adapters of layers and parameters of a model, by name; a shared one under its first, or under each.

    `modules` are those of the model, where the caller has listed them.
    """
    first: dict[AdaptedWeights, str] = {}
    places = adapted_places(model, remove_duplicate=remove_duplicate, modules=modules)
    return {name: each for name, _, each in places if first.setdefault(each, name) == name or not remove_duplicate}


def adapters_in(module: object) -> Mapping[str, AdaptedWeights]:
    """Return what is adapted in a module itself, by the parameter's name, or under "" where the whole layer is."""
    return module.lora_adapters() if isinstance(module, AdaptedModule) else {}  # type: ignore[return-value]


def layer_adapter(module: object) -> AdaptedWeights | None:
    """Return the adapter of a module that is adapted as a whole, else None."""
    return adapters_in(module).get("")


def adapter_of(module: nn.Module, weight: str) -> AdaptedWeights | None:
    """Return the adapter that changes a parameter of a module itself, or None."""
    return next((each for each in adapters_in(module).values() if weight in each.adapted_weights()), None)


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
