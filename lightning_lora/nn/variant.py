"""A variant of LoRA is one class: what an adapter stores, the initial values, and what is added to the weight.

A live layer, an adapter apart from any model and a file all hold the same mapping `stored`: leaf name -> tensor. Only
the variant knows what its leaf names mean. All other code calls the variant's methods and uses no leaf name itself.

To define a variant, subclass Variant in a new file and import that file. LoRAConfig(variant=name) then finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import KNOWN_VARIANTS, LEAVES, PREFIX
from . import low_rank
from .autocast import without_autocast
from .low_rank import LowRankBlock

Stored = Mapping[str, torch.Tensor]  # tensors of one layer's adapter, by leaf name
Weight = Callable[[], torch.Tensor]  # returns a layer's weight as stored
RowChunks = Iterable[tuple[int, torch.Tensor]]  # (first row, some rows of a weight as a matrix)
Reader = Callable[[], RowChunks]  # reads a layer's weight part by part

BY_OPTION: dict[str, Variant] = {}  # variants that another option than `variant` asks for, by its name
ROWS_OPTION, START_OPTION = "trainable_token_indices", "init_lora_weights"


@dataclass(frozen=True)
class LayerInfo:
    """What a variant knows about one adapted layer or single parameter, in a live model or in a file.

    Attributes:
        name: of the layer in the model.
        kind: one of low_rank.KINDS.
        shape: of the layer's weight as stored; empty if it is not known.
        rank: r.
        scaling: s.
        enabled: which equal parts of a fused projection are adapted; None for the whole projection.
        init: LoRAConfig's init_lora_weights.
        seed: of the generator for random values.
        rows: ascending numbers of the trained rows of a table.
        options: the variant's own options, by name.
    """

    name: str
    kind: str
    shape: torch.Size
    rank: int
    scaling: float
    enabled: tuple[bool, ...] | None = None
    init: bool | str = True
    seed: int = 0
    rows: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_lookup(self) -> bool:
        """Whether A is a table from which rows are looked up."""
        return self.kind == low_rank.EMBEDDING

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.kind in low_rank.TRANSPOSED

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B of plain LoRA."""
        return low_rank.factor_shapes(self.kind, self.shape, self.rank, self.enabled)

    def matrix_shape(self) -> tuple[int, int]:
        """Return (out, in) of the weight; a convolution's kernel size counts to in."""
        return low_rank.matrix_shape(self.kind, self.shape)

    def shaped(self, factors: EffectiveFactors) -> EffectiveFactors:
        """Return factors, of a convolution in the shapes of low_rank.py; they may be matrices before."""
        a, b, scale = factors
        if self.kind not in low_rank.CONVOLUTIONS or a.dim() > 2:
            return factors
        kernel = self.shape[1:]
        return EffectiveFactors(a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1)), scale)

    def low_rank_blocks(self, a: torch.Tensor, b: torch.Tensor) -> list[LowRankBlock]:
        """Return the blocks that B @ A adds to the weight, without the scaling.

        Args:
            a: A, in the shape that low_rank.py states for the kind, or flattened to a matrix.
            b: B, likewise.
        """
        return low_rank.low_rank_blocks(self.kind, self.shape, a, b, self.enabled)


class EffectiveFactors(NamedTuple):
    """The factors and the scale that stored tensors act as: W' = scale * (W + s * b @ a).

    `a` and `b` have the shapes that low_rank.py states for the kind of layer; the variant chooses their rank. For a
    convolution they may also be matrices (rank, in * kernel) and (out, rank). `scale` is (out,), or None for no scale.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None


class Variant:
    """What one layer's adapter stores and what it adds to the weight.

    A variant has no state, and one object serves all layers. A subclass needs a name, the leaf names of its tensors,
    `shapes`, `start` and `effective_factors`. All else has a default.

    Attributes:
        name: the value of LoRAConfig's `variant`; "" for a variant that another option asks for.
        title: the variant's name in sentences, for example "LoRA"; `name` by default.
        trained: leaf names of the trained tensors. Each begins with "lora_". The last of the tensors must get a
            gradient from the first step on.
        frozen: leaf names of the tensors that are stored but not trained.
        has_scale: whether `effective_factors` returns a scale. Such adapters are no sums of products: they cannot be
            combined, attached or put into the served form.
        reads_weight: whether the scale is computed from W. Such adapters cannot adapt quantized layers, and a sharded
            W is gathered to merge them.
        follows_weight: whether `start` reads W. Tensors that were not trained yet are then drawn again where another W
            is loaded.
        own_options: options that only this variant has (LoRAConfig's variant_options), with their defaults.
        split_like: "lora_A" or "lora_B" by leaf name: under a tensor parallel plan, the tensor is split like that
            factor of plain LoRA. A layer that stores any other tensor refuses such a plan.
        kinds: the kinds of layers that can be adapted, see low_rank.KINDS.
        asked_by: the option of LoRAConfig that asks for a variant without a name.
        peft_type: the value in PEFT's adapter_config.json, or "" for a variant that PEFT does not have. Subclasses do
            not inherit it.
        peft_leaves: our leaf names by the end of PEFT's tensor name after the layer's name, such as "lora_A.weight".
        peft_attention: PEFT adapts attention with the variant.
        peft_fields: options that PEFT's config of the variant has under the same name; empty for a peft.LoraConfig.
        peft_names: the names of other options in PEFT's config of the variant, by ours.

    Example::

        >>> class Plain(Variant):
        ...     name, trained = "plain", ("lora_plain_a", "lora_plain_b")
        ...     def shapes(self, info):
        ...         return dict(zip(self.trained, info.factor_shapes()))
        ...     def start(self, info, weight):
        ...         a, b = self.shapes(info).values()
        ...         return {"lora_plain_a": torch.randn(a), "lora_plain_b": torch.zeros(b)}
        ...     def effective_factors(self, stored, weight, scaling):
        ...         return stored["lora_plain_a"], stored["lora_plain_b"], None
        >>> inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(variant="plain", r=2))
        ['0']
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    leaves: ClassVar[tuple[str, ...]] = ()  # trained and frozen leaf names; set for each subclass
    kinds: ClassVar[tuple[str, ...]] = low_rank.KINDS
    has_scale: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    follows_weight: ClassVar[bool] = False
    own_options: ClassVar[Mapping[str, Any]] = {}
    split_like: ClassVar[Mapping[str, str]] = {}
    asked_by: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    peft_leaves: ClassVar[Mapping[str, str]] = {}
    peft_attention: ClassVar[bool] = True
    peft_fields: ClassVar[Sequence[str]] = ()
    peft_names: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        """Make the variant known."""
        super().__init_subclass__()
        own, cls.leaves = vars(cls), (*cls.trained, *cls.frozen)
        if own.get("name") and "title" not in own:
            cls.title = cls.name
        if "peft_type" not in own:  # a subclass may store the same tensors as its parent and give them another meaning
            cls.peft_type = ""
        for leaf in cls.leaves:
            if not leaf.startswith(PREFIX):
                raise LoRAError(f"Variant: {cls.__qualname__}: the leaf name {leaf!r} must begin with {PREFIX!r}.")
        if cls.reads_weight and not cls.has_scale:
            raise LoRAError(
                f"Variant: {cls.__qualname__}: reads_weight is for a scale that is computed from W, and the class "
                "declares no scale. Set has_scale = True too, or leave reads_weight out."
            )
        LEAVES.update(cls.leaves)
        if own.get("name"):
            KNOWN_VARIANTS[cls.name] = cls()
        elif "asked_by" in own:
            BY_OPTION[cls.asked_by] = cls()

    # --- what is stored ---

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's trained and frozen tensors, by leaf name."""
        raise NotImplementedError

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        """Return the initial values of a layer's trained and frozen tensors, by leaf name, the same each time.

        A layer calls it with the user's autocast off.

        Args:
            info: of the layer. Draw random values on the CPU, from info.seed only.
            weight: returns W as stored. Collective where it is sharded: call it on all ranks or on none.
        """
        raise NotImplementedError

    def is_initial(self, stored: Stored, info: LayerInfo) -> bool:
        """Return whether nothing was trained yet; False if the values cannot tell."""
        return False

    # --- what it adds ---

    def effective_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        """Return the factors and the scale that stored tensors act as, differentiable in the trained ones.

        A forward calls it under the user's autocast. All else goes through `effective_factors_exactly`, where autocast
        is off.

        Args:
            stored: by leaf name.
            weight: W as a matrix (out, in); a convolution's kernel is flattened. None if reads_weight is false. Also
                None if the caller wants no scale; a variant that computes it from W leaves it out then.
            scaling: s.
        """
        raise NotImplementedError

    def checked_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        """Return `effective_factors`. A scale that the class does not declare would be lost where sums are formed.

        Raises:
            LoRAError: there is such a scale.
        """
        factors = self.effective_factors(stored, weight, scaling)
        factors = factors if type(factors) is EffectiveFactors else EffectiveFactors(*factors)
        if factors.scale is not None and not self.has_scale:
            raise LoRAError(
                f"Variant: effective_factors of {type(self).__qualname__} returns a scale, and the class declares "
                "none. Set has_scale = True in the class, and reads_weight = True if the scale is computed from W."
            )
        return factors

    def effective_factors_exactly(
        self, stored: Stored, weight: torch.Tensor | None, scaling: float
    ) -> EffectiveFactors:
        """Return `checked_factors` without the user's autocast, which would round its products to 16 bits."""
        with without_autocast(next(iter(stored.values())).device.type):
            return self.checked_factors(stored, weight, scaling)

    def blocks(self, stored: Stored, info: LayerInfo, read: Reader) -> list[LowRankBlock]:
        """Return the blocks that merging adds to the weight, without s, with the scale of the sum.

        Args:
            stored: by leaf name, not sharded.
            info: of the layer.
            read: reads the weight part by part, as stored; called only if reads_weight is true.
        """
        if stored[self.trained[0]].dtype in low_rank.HALF:
            # `effective_factors` would round its results to 16 bits, but W' must be rounded only once.
            stored = {leaf: tensor.float() for leaf, tensor in stored.items()}
        weight = None
        if self.reads_weight:
            weight = low_rank.matrix_view(info.kind, torch.cat([part for _, part in read()]))
        a, b, scale = self.effective_factors_exactly(stored, weight, info.scaling)
        blocks = info.low_rank_blocks(a, b)
        return blocks if scale is None else scaled_blocks(blocks, scale, transposed=info.is_transposed)

    def live_blocks(self, stored: Stored, info: LayerInfo, weight: torch.Tensor, read: Reader) -> list[LowRankBlock]:
        """Return `blocks` for the weight of a live layer. Collective where it is sharded.

        Override it to sum over the ranks what `blocks` computes from a whole weight, which `read` would gather.
        """
        return self.blocks(stored, info, read)

    # --- what it goes with ---

    @property
    def option(self) -> str:
        """The option by which a user asks for the variant, for messages."""
        return f"variant={self.name!r}"

    def why_not_with(self, config: LoRAConfig) -> str:
        """Return why the variant does not go with options, as "<option> must be <what it must be>", or ""."""
        if config.has_start:
            return f"init_lora_weights must be one that does not start from the weight, with {self.option}"
        for option in ("enable_lora", "target_parameters") if self.has_scale else ():
            if getattr(config, option):
                return f"{option} must be left out with {self.option}, which adapts whole layers"
        return ""

    def why_not_on(self, module: nn.Module, kind: str, config: LoRAConfig) -> str:
        """Return why the variant cannot adapt a module of this kind with these options, or "".

        inject puts the text between the name of the module and the advice to leave it out. A remedy in it begins with
        "; ".
        """
        if self.has_scale and kind == low_rank.ATTENTION and getattr(module, low_rank.IN_PROJ, None) is None:
            return f"{self.option} cannot adapt attention with separate weights for q, k and v"
        return ""

    # --- apart from a model ---

    def options(self) -> dict[str, Any]:
        """Return the options of LoRAConfig that ask for this variant."""
        return {"variant": self.name}

    def rank(self, stored: Stored) -> int:
        """Return r of a layer.

        By default return the rank of the factors from `effective_factors`. Override this if that rank is not r.
        """
        _, b, _ = self.effective_factors_exactly(stored, None, 1.0)
        return b.shape[1]

    # --- in PEFT: by default its tensors and options are the same there ---

    def why_not_in_peft(self, kind: str) -> str:
        """Return why PEFT cannot express the adapter of a layer of this kind, or "". It follows the layer's name."""
        if not self.peft_type or not {*self.peft_leaves.values(), *self.frozen}.issuperset(self.leaves):
            return f"has an adapter of the variant {self.title}, which PEFT does not have"
        if kind == low_rank.ATTENTION_OUTPUT and not self.peft_attention:
            return f"belongs to attention, which PEFT does not adapt with {self.option}"
        return ""

    def peft_leaf(self, leaf: str, kind: str) -> str:
        """Return the end of PEFT's name for a tensor of a layer of this kind; by default the first in peft_leaves."""
        return next(theirs for theirs, ours in self.peft_leaves.items() if ours == leaf)

    def to_peft(self, stored: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Return a layer's tensors with PEFT's values and shapes, by our leaf names.

        Leave out tensors that PEFT does not store.

        Args:
            stored: by leaf name, detached.
            info: of the layer. Its kind is "" and its shapes are empty if they are not known.
        """
        return dict(stored)

    def from_peft(self, found: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Undo to_peft: return a layer's tensors by leaf name.

        Raises:
            LoRAError: the tensors do not have the form that to_peft gives them.
        """
        return dict(found)

    def config_in_peft(self, config: LoRAConfig) -> LoRAConfig:
        """Return the options for the tensors of to_peft, which may have another rank. The scalings must stay."""
        return config

    def options_to_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of adapter_config.json without peft_type, from those of an equivalent peft.LoraConfig.

        Raises:
            ValueError: PEFT's config of the variant cannot express an option. The text names it, as part of a sentence.
        """
        if not self.peft_fields:
            return dict(options)
        same = {name: options.get(name) for name in self.peft_fields}
        return same | {theirs: options[ours] for ours, theirs in self.peft_names.items()}

    def options_from_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Undo options_to_peft: return the fields of an equivalent peft.LoraConfig.

        Raises:
            ValueError: the variant cannot do what a field asks for. The text names it, as part of a sentence.
        """
        ours = {theirs: ours for ours, theirs in self.peft_names.items()}
        return {ours.get(name, name): value for name, value in options.items()}


class NothingTrained(Variant):
    """The variant of a layer in which attached adapters act alone: it stores nothing."""

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {}

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        return {}


def variant_of(config: LoRAConfig) -> Variant:
    """Return the variant that a LoRAConfig asks for."""
    return BY_OPTION[START_OPTION] if config.has_start else KNOWN_VARIANTS[config.variant]


def variant_with(leaves: Collection[str]) -> Variant:
    """Return the variant of layers that stores the most of these leaf names and, among such, the fewest others.

    Plain LoRA is returned where no variant stores any of them.
    """
    wanted = set(leaves)
    of_layers = [variant for variant in known_variants() if variant.asked_by != ROWS_OPTION]
    return min(of_layers, key=lambda variant: (len(wanted.difference(variant.leaves)), len(variant.leaves)))


def rows_leaf() -> str:
    """Return the leaf name of a table's trained rows."""
    return BY_OPTION[ROWS_OPTION].trained[0]


def known_variants() -> list[Variant]:
    """Return all variants, also those without a name."""
    return [*KNOWN_VARIANTS.values(), *BY_OPTION.values()]


def scaled_blocks(blocks: Iterable[LowRankBlock], scale: torch.Tensor, *, transposed: bool) -> list[LowRankBlock]:
    """Return blocks with a scale (out,). Each block must cover every output."""
    scale = scale.view(1, -1) if transposed else scale.view(-1, 1)
    return [block._replace(scale=scale) for block in blocks]
