"""The adapter of one layer or one parameter: its options and state, its stored tensors, and how they are merged.

The adapter's variant (nn/variant.py) defines what the stored tensors mean.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..config import FROM_GRADIENTS
from ..distributed.flat import flat_parameters, unsharded_shape
from ..distributed.sharding import copy_, detached, from_local_like, full_tensor, is_spread, local, windows
from ..errors import LoRAError
from . import low_rank
from .attached_factors import AttachedFactors, Packed, add_attached
from .autocast import without_autocast
from .exact_merge import Buffers, Undo, merge_weight_, merged_weight, restored_weight, row_chunks, unmerge_weight_
from .gradient_checkpointing import in_first_pass, records_gradients
from .low_rank import LowRankBlock, crop_to_window, dense_delta
from .variant import EffectiveFactors, LayerInfo, NothingTrained, Stored, Variant

Blocks = list[LowRankBlock]  # of one weight

NOTHING = NothingTrained()


@dataclass(frozen=True)
class LayerSpec:
    """The options of one adapted layer."""

    r: int
    alpha: float
    scaling: float  # s
    variant: Variant  # defines the stored tensors and what they add to the weight
    dropout: float = 0.0  # probability of dropping an input feature of the adapter
    enabled: tuple[bool, ...] | None = None  # which equal parts of a fused projection are adapted; None: all as one
    keep_float32: bool = True  # stored tensors stay in float32 when the model is cast to 16 bits
    init: bool | str = True  # LoRAConfig's init_lora_weights
    seed: int = 0  # of the generator that initial values are drawn from
    rows: tuple[int, ...] = ()  # ascending numbers of the trained rows of a table
    options: Mapping[str, Any] = field(default_factory=dict)  # the variant's own options, by name


@dataclass
class LayerState:
    """The state of an adapted layer beside its parameters: `layer.lora`."""

    spec: LayerSpec
    name: str = ""  # in the injected module
    injection: Any = None  # the injection; all layers of a model share it
    custom_forward: bool = False  # the layer's class overrides torch's forward, so that forward runs on W'
    merged: bool = False  # merge was called
    undo: Undo | None = None  # what unmerging needs, while the weight is merged
    unfinished: bool = False  # merging or unmerging runs, or an exception broke it off; unmerge_ completes it
    stands_in: int = 0  # number of forwards with W' in place of the weight, all in the thread with the lock
    why_not_merge: str = ""  # why the weight cannot be merged, for example another owner
    restore_failed: bool = False  # unmerging failed, so the weight may differ from W
    rounding_reported: bool = False  # the cost of rounding W' was reported
    sharded: int = 0  # over how many dimensions of ranks the weight lay when it was last seen
    training_checked: bool = False  # training was seen to reach the layer, or a warning has named it
    in_segment: bool = False  # the layer ran in a segment of reentrant checkpointing, in training mode
    strength: float = 1.0  # of the trained adapter, another one inside `scaled`; with 0 it does not act
    attached: Packed | None = None  # the attached adapters
    known_info: tuple[LayerSpec, LayerInfo] | None = None  # the last result of `layer_info`, with its spec
    # Memory of plain copies, kept from merge to merge: on the CPU fresh pages take longer than the copy.
    copies: Buffers = field(default_factory=Buffers)
    # Held while W' stands in for the weight and while the weight is written. A copy of the layer has its own.
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("copies", "lock", "known_info")}
        # A copy or a pickle that is made inside `scaled` is the model as it is outside of the block.
        state["strength"] = float(bool(self.spec.variant.leaves))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, copies=Buffers(), lock=threading.RLock(), known_info=None)


class AdaptedWeights:
    """The adapter of one layer or of one parameter, and the weight that it changes.

    A layer is its own AdaptedWeights (LoRALayer); the adapter of a single parameter and that of tied tables are objects
    beside the module. Each says which module holds it, which parameter it changes, and how a forward runs.
    """

    KIND: str
    lora_A: nn.Parameter  # of plain LoRA and the variants that extend it
    lora_B: nn.Parameter
    LOOKUP: ClassVar[bool] = False  # A is a table from which rows are looked up
    lora: LayerState
    lora_active: bool  # whether the adapters are applied in a forward

    # --- where it lies ---

    @property
    def lora_holder(self) -> nn.Module:
        """The module that holds the weights and the stored tensors."""
        raise NotImplementedError

    def lora_holders(self) -> list[nn.Module]:
        """Return every module whose forward the adapter acts in."""
        return [self.lora_holder]

    @property
    def weight_leaf(self) -> str:
        """The name in the holder of the parameter that the adapter changes."""
        raise NotImplementedError

    def adapted_weight(self) -> nn.Parameter:
        """Return the parameter that the adapter changes."""
        return cast(nn.Parameter, getattr(self.lora_holder, self.weight_leaf))

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the weight's values, from which the dtype of the stored tensors follows."""
        return self.adapted_weight().dtype

    def weight_values(self) -> torch.Tensor:
        """Return the weight's values, detached. A sharded weight stays sharded."""
        return detached(self.adapted_weight())

    def weight_shape(self) -> torch.Size:
        """Return the weight's shape."""
        return unsharded_shape(self.adapted_weight())

    def kind(self) -> str:
        """Return the layer's kind, one of low_rank.KINDS, or "" for a table with trained rows.

        A linear layer does not know whether it is the out_proj of attention.
        """
        return self.KIND

    def layer_info(self, spec: LayerSpec | None = None) -> LayerInfo:
        """Return what the variant knows about the layer.

        Args:
            spec: other options to use instead of the layer's own.
        """
        spec = spec or self.lora.spec
        # A compiled forward must not depend on the remembered result: with another one it would be compiled again.
        remembers = not torch.compiler.is_compiling()
        known = self.lora.known_info if remembers else None
        if known is not None and known[0] is spec and known[1].name == self.lora.name:
            return known[1]
        info = LayerInfo(
            name=self.lora.name,
            kind=self.KIND,
            shape=self.weight_shape(),
            rank=spec.r,
            scaling=spec.scaling,
            enabled=spec.enabled,
            init=spec.init,
            seed=spec.seed,
            rows=spec.rows,
            options=spec.options,
        )
        if remembers and spec is self.lora.spec:
            self.lora.known_info = spec, info
        return info

    def options_text(self) -> str:
        """Return r and alpha as text, for the module's repr."""
        options = []
        if self.has_trained_adapter():
            options.append(f"r={self.lora.spec.r}, alpha={self.lora.spec.alpha:g}")
        if self.lora.attached is not None:
            options.append(f"attached={[*self.lora.attached.shares]}")
        return ", ".join(options)

    def has_trained_adapter(self) -> bool:
        """Return whether the layer has an adapter that is trained, and not attached ones alone."""
        return bool(self.lora.spec.variant.leaves)

    # --- its stored tensors and how they start ---

    def stored(self, leaves: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        """Return the stored tensors by leaf name: trained ones first, then frozen ones.

        Args:
            leaves: leaf names to return; by default all.
        """
        holder = self.lora_holder
        return {leaf: getattr(holder, self.stored_name(leaf)) for leaf in leaves or self.lora.spec.variant.leaves}

    def stored_name(self, leaf: str) -> str:
        """Return the name of a stored tensor in the holder."""
        return leaf

    def stored_names(self) -> list[str]:
        """Return the names of all stored tensors in the holder."""
        return [self.stored_name(leaf) for leaf in self.lora.spec.variant.leaves]

    def stored_in(self, state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """Return the stored tensors' values in a state dict, by leaf name."""
        return {leaf: state[prefix + self.stored_name(leaf)] for leaf in self.lora.spec.variant.leaves}

    def replaced_rows(self) -> tuple[int, ...]:
        """Return the numbers of the weight's rows that the adapter replaces, whatever values they had."""
        return self.lora.spec.rows

    def trained_tensors(self) -> tuple[nn.Parameter, ...]:
        """Return the trained parameters. The last one gets a gradient from the first step on."""
        return tuple(self.stored(self.lora.spec.variant.trained).values())

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Return the initial values of the stored tensors, the same each time.

        Collective where W is sharded and the variant reads it.
        """
        with without_autocast("cpu"), without_autocast(self.adapted_weight().device.type):
            return self.lora.spec.variant.start(self.layer_info(), self.weight_values)

    def create_(self, dtype: torch.dtype, *, values_follow: bool = False) -> None:
        """Register the stored tensors with their initial values, or zeros where other values follow. In place."""
        variant = self.lora.spec.variant
        if variant.follows_weight and values_follow:
            values = {leaf: torch.zeros(shape) for leaf, shape in variant.shapes(self.layer_info()).items()}
        else:
            values = self.initial_values()
        device = self.adapted_weight().device
        for leaf in (*variant.trained, *variant.frozen):
            # Contiguous, as a loaded tensor is: products with another layout differ in their last bits.
            tensor = values[leaf].to(device, dtype).contiguous()
            if leaf in variant.frozen:
                tensor = tensor.clone()  # starts.py returns one tensor as A and as A0, and only A is trained
            parameter = nn.Parameter(tensor, requires_grad=leaf in variant.trained)
            for holder in self.lora_holders():
                holder.register_parameter(self.stored_name(leaf), parameter)

    def draw_(self) -> None:
        """Give the stored tensors their initial values. In place. Collective where initial_values is."""
        stored = self.stored()
        for leaf, values in self.initial_values().items():
            copy_(stored[leaf], values.to(stored[leaf].dtype))

    def is_initial(self, *, everywhere: bool = False) -> bool:
        """Return whether the values are those from before training.

        False where values cannot tell, as with init_lora_weights=False.

        Args:
            everywhere: on all ranks, which is collective where the tensors are sharded. Else as far as this rank shows.
        """
        read = full_tensor if everywhere else local
        stored = {leaf: read(tensor) for leaf, tensor in self.stored().items()}
        return self.lora.spec.variant.is_initial(stored, self.layer_info())

    def starts_again(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Return whether the tensors must be drawn again from the weight of a state dict.

        They started from the old weight and were not trained, and the state dict has none of them. Collective where W
        is sharded. Of a flat weight a state dict shows nothing.
        """
        spec = self.lora.spec
        if not spec.variant.follows_weight or spec.init == FROM_GRADIENTS:  # gradients are no values of W
            return False
        values = state_dict.get(prefix + self.weight_leaf)
        if getattr(values, "shape", None) != self.weight_shape():
            return False
        for leaf, live in self.stored().items():
            if state_dict.get(prefix + self.stored_name(leaf), live) is not live:
                return False
        return self.is_initial(everywhere=True)  # last, because it is collective and may gather W

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None], *, loaded: bool) -> None:
        """Tie parameters of several modules again after torch replaced them by separate ones. In place.

        Args:
            module: one of the holders.
            before: its parameters before torch replaced some of them.
            loaded: whether load_state_dict(assign=True) replaced them; otherwise a move or to_empty did.
        """

    # --- what acts, and changes of it ---

    @property
    def scaling(self) -> float:
        """s of the trained adapter, times its present strength."""
        return self.lora.spec.scaling * self.lora.strength

    def attached(self) -> dict[str, AttachedFactors]:
        """Return the adapters that are attached to the layer, by name; see Packed.unpacked."""
        return {} if self.lora.attached is None else self.lora.attached.unpacked()

    def changes_weight(self) -> bool:
        """Return whether W' differs from W: training has reached the adapter, or an attached one acts."""
        is_changed = self.has_trained_adapter() and not self.is_initial()
        return is_changed or any(each.strength for each in self.attached().values())

    def shapes_by(self, spec: LayerSpec) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Return each stored tensor with its shape under other options."""
        stored = self.stored()
        return [(stored[leaf], shape) for leaf, shape in self.lora.spec.variant.shapes(self.layer_info(spec)).items()]

    def take_spec_(self, spec: LayerSpec) -> None:
        """Take another rank and scaling. The parameters stay the same objects, and lose their values if shapes change.

        In place.
        """
        for factor, shape in self.shapes_by(spec):
            if factor.shape != shape:
                factor.data = factor.detach().new_empty(shape)
                factor.grad = None
        self.lora.spec = spec

    def unload_trained(self) -> None:
        """Remove the stored tensors of the trained adapter. In place."""
        for holder in self.lora_holders():
            for name in self.stored_names():
                holder._parameters.pop(name, None)
        self.lora.spec = LayerSpec(r=0, alpha=0, scaling=1, variant=NOTHING)
        self.lora.strength = 0.0

    # --- in a forward ---

    def record_segment(self) -> None:
        """Note that the layer runs in a reentrant segment; the warning about missing gradients names this cause."""
        self.check_strengths()
        if not torch.is_grad_enabled() and self.lora_holder.training and in_first_pass():
            self.lora.in_segment = True

    def check_strengths(self) -> None:
        """Raise LoRAError where checkpointing computes the layer again with other strengths than in its forward."""
        injection = self.lora.injection
        if not torch.compiler.is_compiling() and injection is not None and injection.strength_log.since:
            injection.strength_log.check(self.lora.name)

    def effective_factors(self) -> EffectiveFactors:
        """Return the factors and scale that the stored tensors act as now, differentiable."""
        spec = self.lora.spec
        weight = low_rank.matrix_view(self.KIND, self.adapted_weight()) if spec.variant.reads_weight else None
        return spec.variant.checked_factors(self.stored(), weight, spec.scaling)

    def stand_in(self, weight: torch.Tensor) -> Any:
        """Return what a forward reads in place of the weight W: here W'."""
        return self.dense_weight(weight)

    def dense_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' for W, differentiable in the trained tensors.

        Dropout drops whole input features, the same ones for the whole batch, because the input is not known here.
        Attached adapters have no dropout.
        """
        self.record_segment()
        self.refuse_computed_weight()
        dense = weight
        if self.lora.strength:
            a, b, scale = self.effective_factors()
            if self.drops():
                a = a * F.dropout(a.new_ones(1, a.shape[1], *[1] * (a.dim() - 2)), self.lora.spec.dropout)
            # s goes into B, which is smaller than B @ A. The sum has the wider dtype of the two, and is rounded below.
            dense = dense + self.delta(a, b * self.scaling, self.lora.spec.enabled)
            if scale is not None:
                is_last = self.KIND in low_rank.TRANSPOSED  # the outputs' dimension
                dense = dense * scale.view((1, *weight.shape[1:]) if is_last else (-1, *[1] * (weight.dim() - 1)))
        if self.lora.attached is not None:
            dense = dense + self.delta(*self.lora.attached.factors(weight.device))
        return dense.to(weight.dtype)

    def refuse_computed_weight(self) -> None:
        """Raise LoRAError where the weight is no parameter of its module any longer."""
        if self.weight_leaf not in self.lora_holder._parameters:
            raise LoRAError(
                f"{type(self.lora_holder).__name__}: since injection, {self.weight_leaf} is computed from other "
                "parameters (weight_norm, parametrize); undo that."
            )

    def delta(self, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...] | None = None) -> torch.Tensor:
        """Return B @ A in the weight's shape and the factors' dtype, differentiable."""
        shape = self.layer_info().shape
        return dense_delta(low_rank.low_rank_blocks(self.KIND, shape, a, b, enabled), shape)

    def drops(self) -> bool:
        """Return whether dropout acts now.

        In a Trainer's training batch it acts in eval mode too, but only where gradients are recorded: a user may
        evaluate the model inside the batch.
        """
        return self.lora.spec.dropout > 0 and self.in_training()

    def in_training(self) -> bool:
        """Return whether a forward now is one of training, also where the layer is kept in eval mode."""
        injection = self.lora.injection
        return self.lora_holder.training or (
            injection is not None and injection.in_training_batch and records_gradients()
        )

    # --- merging ---

    def own_weight(self) -> nn.Parameter:
        """Return the weight for merging, where W' does not stand in for it.

        Waits for the forward of another thread in which it does.

        Raises:
            LoRAError: such a forward runs in this thread.
        """
        with self.lora.lock:
            if self.lora.stands_in:
                raise LoRAError(
                    f"merge: {self.lora.name!r}: called inside a forward of this layer, while W' stands in for "
                    "its weight; call it outside of the forward."
                )
            return self.adapted_weight()

    def quantized(self) -> str:
        """Return how the weight is quantized, or "". A quantized layer stays factored when the model is merged."""
        return ""

    def why_not_merge(self) -> str:
        """Return why merging would be wrong for this layer, or ""."""
        return self.lora.why_not_merge

    @property
    def merge_scaling(self) -> float:
        """What `blocks` are still to be multiplied by: s, or 1 where adapters are attached, each with its own s."""
        return self.scaling if self.lora.attached is None else 1.0

    def blocks(self, weight: torch.Tensor, stored: Stored | None = None) -> Blocks:
        """Return the blocks that are added to this rank's shard of the weight, without merge_scaling.

        Collective where the stored tensors or the weight are sharded.

        Args:
            weight: the live one, or that of a state dict.
            stored: by leaf name, instead of the live values.
        """
        whole = {leaf: full_tensor(tensor) for leaf, tensor in (stored or self.stored()).items()}
        info = self.layer_info()
        blocks = Blocks()
        if self.lora.strength:
            blocks = self.lora.spec.variant.live_blocks(whole, info, weight, lambda: row_chunks(full_tensor(weight)))
        if self.lora.attached is not None:
            attached = self.lora.attached.blocks(info.kind, info.shape, weight.device)
            blocks = add_attached(blocks, attached, self.scaling)
        return self.crop_to_shard(blocks, weight)

    def update_blocks(self, stored: Stored | None = None) -> Blocks:
        """Return the blocks that the trained adapter adds to the whole weight, without s and without a scale.

        Collective where `blocks` is.
        """
        whole = {leaf: full_tensor(tensor) for leaf, tensor in (stored or self.stored()).items()}
        a, b, _ = self.lora.spec.variant.effective_factors_exactly(whole, None, self.lora.spec.scaling)
        return self.layer_info().low_rank_blocks(a, b)

    def crop_to_shard(self, blocks: list[LowRankBlock], weight: torch.Tensor) -> list[LowRankBlock]:
        """Return the parts of a weight's blocks that overlap with this rank's shard of the weight.

        Raises:
            LoRAError: the weight is sharded along a dimension of its kernel.
        """
        if not is_spread(weight):
            return blocks
        parts = windows(weight, low_rank.columns_of(self.KIND, unsharded_shape(weight)))
        return [block for part in parts for block in crop_to_window(blocks, part)]

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of a weight in which the first dimension counts the rows of its blocks; a flat slice itself."""
        return weight

    def merge_(
        self,
        *,
        copy: bool,
        cost: list[float] | None = None,
        weight: torch.Tensor | None = None,
        blocks: Blocks | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """Write W' into this rank's shard of the weight. In place. Other arguments are those of merge_weight_.

        Args:
            copy: keep plain copies.
            weight: the result of own_weight, if the caller has it.
            blocks: the result of `blocks` for this weight, if the caller has it.

        Raises:
            NonFiniteError: a value of a sum is not finite. The weight then has its old values.
        """
        state = self.lora
        with state.lock:
            if state.unfinished:
                self.unmerge_()
            if state.merged:  # a second merge would add the adapter to W'
                return
            if weight is None:
                weight = self.own_weight()
            if blocks is None:
                blocks = self.blocks(weight)
            try:
                # Noted before the first write: merge_weight_ fills the undo as it goes, so an exception at any point,
                # such as KeyboardInterrupt, leaves what unmerge_ needs, here or in a later call.
                state.unfinished = True
                state.undo = Undo()
                matrix = self.as_matrix(local(weight))
                copies = None
                if copy:
                    copies = state.copies if matrix.is_cpu else Buffers()
                merge_weight_(
                    matrix, blocks, self.merge_scaling, copies=copies, cost=cost, undo=state.undo, buffers=buffers
                )
                vars(self)["lora_active"] = False  # nn.Module.__setattr__ is many times slower
                state.merged = True
                state.unfinished = False
            except BaseException:
                self.unmerge_()
                raise

    def unmerge_(self, buffers: Buffers | None = None) -> None:
        """Write W back into this rank's shard of the weight, as unmerge_weight_ does. In place.

        If an exception breaks this call off, another call completes it.

        Raises:
            LoRAError: something else changed the merged weight. W is lost, unless a plain copy of it was kept.
        """
        failure = None
        state = self.lora
        with state.lock:
            weight = self.adapted_weight()
            state.unfinished = True
            if state.undo is not None:
                try:
                    unmerge_weight_(self.as_matrix(local(weight)), state.undo, buffers)
                except LoRAError as error:
                    failure = error  # raised at the end: the layer is unmerged all the same
                    state.restore_failed = state.restore_failed or state.undo.lost
                state.undo = None
            vars(self)["lora_active"] = True
            state.merged = False
            state.unfinished = False
        if failure:
            raise failure

    @contextmanager
    def briefly_unmerged(self) -> Iterator[None]:
        """Unmerge inside the block, so that a move, a cast or a load there changes W; merge again afterwards.

        Raises:
            LoRAError: the layer cannot be merged again after the change. It then stays unmerged.
        """
        if self.lora.undo is None:
            yield
            return
        copy = self.lora.undo.is_copied()
        was_merged = self.lora.merged
        self.unmerge_()
        try:
            yield
        finally:  # also after a change that failed: the other layers are merged, and a forward expects that of all
            if was_merged:  # else an exception had broken a merge off
                self._merge_again(copy)

    def _merge_again(self, copy: bool) -> None:
        if self.why_not_merge():  # the change may have untied tables
            self.lora.merged = True
            return
        try:
            self.merge_(copy=copy)
        except LoRAError as error:
            raise LoRAError(
                f"{self.lora.name!r}: this layer was merged, and cannot be merged again after the cast, move or load: "
                f"{error}. It is unmerged now, and other layers may still be merged. Call unmerge(model), then repeat "
                "or undo the change."
            ) from error

    def original(self) -> torch.Tensor:
        """Return W, detached. While the weight is merged, it is a new tensor; otherwise it shares the weight's memory.

        Raises:
            LoRAError: unmerging failed earlier, so W is lost.
        """
        with self.lora.lock:  # waits while another thread merges or has W' in place of W
            flat = flat_parameters(self.lora_holder)
            name = self.weight_leaf
            weight = detached(flat[name] if name in flat else getattr(self.lora_holder, name))
            if self.lora.restore_failed:
                raise LoRAError(
                    f"{type(self.lora_holder).__name__}: its base weight could not be restored after merging, so "
                    "nothing is saved from it; load the base weights again."
                )
            if self.lora.undo is None:
                return weight
            shard = local(weight)
            return from_local_like(restored_weight(self.as_matrix(shard), self.lora.undo).view(shard.shape), weight)

    def base_values(self) -> torch.Tensor:
        """Return this rank's shard of W, detached; a quantized weight is dequantized."""
        return local(self.original())

    def merged_weight(self, weight: torch.Tensor, blocks: Blocks, cost: list[float] | None = None) -> torch.Tensor:
        """Return W' as a new tensor, sharded like W.

        Args:
            weight: W.
            blocks: the result of `blocks` for this weight.
            cost: as of merge_weight_.
        """
        shard = local(weight)
        values = merged_weight(self.as_matrix(shard), blocks, self.merge_scaling, cost=cost).view(shard.shape)
        return from_local_like(values, weight)


def add_trained_adapter_(layer: AdaptedWeights, spec: LayerSpec) -> AdaptedWeights:
    """Add a trained adapter to a layer in which attached ones act alone; `create_` makes its tensors. In place."""
    layer.lora.spec = spec
    layer.lora.strength = 1.0
    return layer


@contextmanager
def active_as(layers: Collection[AdaptedWeights], active: bool) -> Iterator[None]:
    """Switch these adapters on or off inside the block; afterwards each is as it was before."""
    before = [layer.lora_active for layer in layers]
    try:
        for layer in layers:
            layer.lora_active = active
        yield
    finally:
        for layer, was_active in zip(layers, before, strict=True):
            layer.lora_active = was_active
