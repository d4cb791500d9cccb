"""A variant of LoRA is one class: what an adapter stores, the initial values, and what is added to the weight.

A live layer, an adapter apart from any model and a file all hold the same mapping `stored`: leaf name -> tensor. Only
the variant knows what its leaf names mean. All other code calls the variant's methods and uses no leaf name itself.

To define a variant, subclass Variant in a new file and import that file. LoRAConfig(variant=name) then finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..distributed.sharding import full_tensor
from ..errors import LoRAError
from ..names import KNOWN_VARIANTS, PREFIX, register_leaf
from . import low_rank
from .autocast import without_autocast
from .low_rank import LowRankBlock
from .peft_form import PeftForm

Config = Any  # a LoRAConfig; importing config.py here would add a floor to the package
Stored = Mapping[str, torch.Tensor]  # tensors of one layer's adapter, by leaf name
Weights = Callable[[], Mapping[str, torch.Tensor]]  # returns a layer's weights as stored, by name
Parts = Iterable[tuple[int, torch.Tensor]]  # (first row, some rows of a weight as a matrix)
Reader = Callable[[str], Parts]  # reads the weight with this name part by part

_STARTED: dict[str, Variant] = {}  # variants with `started`, by name; init_lora_weights asks for them
_ALL: dict[str, Variant] = {}  # every variant, by the qualified name of its class


@dataclass(frozen=True)
class Place:
    """What a variant knows about one adapted layer or single parameter, in a live model or in a file.

    Attributes:
        name: of the layer in the model.
        kind: one of low_rank.KINDS.
        shapes: of the layer's weights as stored, by name.
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
    shapes: Mapping[str, torch.Size]
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
        return low_rank.factor_shapes(self.kind, self.shapes, self.rank, self.enabled)

    def matrix_shape(self) -> tuple[int, int]:
        """Return (out, in) of the weight; a convolution's kernel size counts to in."""
        return low_rank.matrix_shape(self.kind, next(iter(self.shapes.values())))

    def shaped(self, acting: Acting) -> Acting:
        """Return `acting` with a convolution's factors in the shapes of low_rank.py; they may be matrices before."""
        a, b, scale = acting
        if self.kind not in low_rank.CONVOLUTIONS or a.dim() > 2:
            return acting
        kernel = next(iter(self.shapes.values()))[1:]
        return Acting(a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1)), scale)

    def low_rank_blocks(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, list[LowRankBlock]]:
        """Return the blocks that B @ A adds to each weight, without the scaling.

        Args:
            a: A, in the shape that low_rank.py states for the kind, or flattened to a matrix.
            b: B, likewise.
        """
        return low_rank.low_rank_blocks(self.kind, self.shapes, a, b, self.enabled)


class Acting(NamedTuple):
    """The factors and the scale that stored tensors act as: W' = scale * (W + s * b @ a).

    `a` and `b` have the shapes that low_rank.py states for the kind of layer; the variant chooses their rank. For a
    convolution they may also be matrices (rank, in * kernel) and (out, rank). `scale` is (out,), or None for no scale.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None


class Fault(NamedTuple):
    """A reason why the stored tensors of a layer are invalid, as part of a message.

    Without `leaf`, the message is "<layer>: <text>", for example with the text "A and B do not share a rank". With
    `leaf`, it is "<name of that tensor> must be <text>", for example with the text "32 floating point values".
    """

    text: str
    leaf: str = ""


class Expected(NamedTuple):
    """What a layer's tensors mean, for a check of merged weights that shares no arithmetic with merging.

    W' = W + s * (sum of b @ a over the pairs). If lengths are given, the weights of each output are then scaled to have
    that norm.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (a, b), float64, in the shapes that low_rank.py states
    lengths: torch.Tensor | None = None  # (out,)
    rounded: bool = False  # merging computes the pairs from the stored tensors, and rounds them to float32 or better


class Variant(PeftForm):
    """What one layer's adapter stores and what it adds to the weight.

    A variant has no state, and one object serves all layers. The methods and attributes inherited from PeftForm define
    how the variant looks in PEFT's files.

    Attributes:
        name: the value of LoRAConfig's `variant`, unique; "" for a variant that another option asks for.
        title: the variant's name in sentences, for example "LoRA"; `name` by default.
        trained: leaf names of the trained tensors. Each begins with "lora_". The last of the tensors must get a
            gradient from the first step on.
        frozen: leaf names of the tensors that are stored but not trained.
        shared: leaf names of frozen tensors that all layers of a model share. Each is one nn.Parameter, registered in
            every layer.
        placed_as: "lora_A" or "lora_B" by leaf name: under a tensor parallel plan, the tensor is split like that factor
            of plain LoRA. A layer that stores any other tensor refuses such a plan.
        kinds: the kinds of layers that can be adapted, see low_rank.KINDS.
        follows_weight: whether some tensors start from W's values, see `followers`.
        started: whether A and B start from values that are subtracted again. Such a variant is asked for by
            init_lora_weights together with the name.
        scaled: whether s is lora_alpha / r. Otherwise s is 1 and lora_alpha has no effect.
        own_options: options that only this variant has (LoRAConfig's variant_options), with their defaults.
        replaces_rows: whether the adapter belongs to a table and stores the present values of some of its rows.
        reads_weight: whether `acting` returns a scale that it computes from W. Such adapters cannot be combined.
        scale_title: the name, in the plural, of the values that the scale is computed from, for example "lengths".
            Reports that look at B @ A only say that these values do not count.

    Example::

        >>> class Plain(Variant):
        ...     name, trained = "plain", ("lora_plain_a", "lora_plain_b")
        ...     def shapes(self, place):
        ...         return dict(zip(self.trained, place.factor_shapes()))
        ...     def start(self, place, weights):
        ...         a, b = self.shapes(place).values()
        ...         return {"lora_plain_a": torch.randn(a), "lora_plain_b": torch.zeros(b)}
        ...     def acting(self, stored, weight, scaling):
        ...         return stored["lora_plain_a"], stored["lora_plain_b"], None
        >>> inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(variant="plain", r=2))
        ['0']
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    leaves: ClassVar[tuple[str, ...]] = ()  # trained, frozen and shared leaf names; set for each subclass
    placed_as: ClassVar[Mapping[str, str]] = {}
    kinds: ClassVar[tuple[str, ...]] = low_rank.KINDS
    started: ClassVar[bool] = False
    replaces_rows: ClassVar[bool] = False
    follows_weight: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    own_options: ClassVar[Mapping[str, Any]] = {}
    scale_title: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.leaves = (*cls.trained, *cls.frozen, *cls.shared)
        own = vars(cls)
        if "name" in own and "title" not in own:
            cls.title = cls.name
        if "peft_type" not in own:  # a subclass may store the same tensors as its parent and give them another meaning
            cls.peft_type = ""
        if "acting" in own and "expected" not in own:
            cls.expected = Variant.expected  # type: ignore[method-assign]
        variant, known = cls(), _STARTED if cls.started else KNOWN_VARIANTS
        has_name = bool(own.keys() & {"name", "started"} and cls.name)
        other = type(known.get(cls.name, variant)) if has_name else cls
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise LoRAError(
                f"Variant: {cls.__qualname__}: the variant {cls.name!r} is {other.__module__}.{other.__qualname__} "
                "already; choose another name."
            )
        try:
            for leaf in cls.leaves:
                register_leaf(leaf, cls.role(leaf))
        except ValueError as error:
            raise LoRAError(f"Variant: {cls.__qualname__}: the leaf name {error}.") from None
        _ALL[f"{cls.__module__}.{cls.__qualname__}"] = variant
        if has_name:
            known[cls.name] = variant

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    # --- what is stored ---

    @classmethod
    def role(cls, leaf: str) -> str:
        """Return the role of a stored tensor, for example "A". Param groups and statistics are keyed by it."""
        return leaf.removeprefix(PREFIX)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's trained and frozen tensors, by leaf name."""
        raise NotImplementedError

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        """Return the initial values of a layer's trained and frozen tensors, by leaf name, the same each time.

        A layer calls it with the user's autocast off.

        Args:
            place: the layer. Draw random values on the CPU, from place.seed only.
            weights: returns the layer's weights by name. Collective where they are sharded: call it on all ranks or on
                none.
        """
        raise NotImplementedError

    def start_shared(self, places: Iterable[Place], seed: int) -> dict[str, torch.Tensor]:
        """Return the initial values of a model's shared tensors, by leaf name, large enough for each of its layers.

        Args:
            places: the layers that share them.
            seed: of the generator for random values.
        """
        return {}

    def needs_values(self, place: Place) -> bool:
        """Return whether `start` needs the values of the weight, and so refuses one on the meta device."""
        return False

    def followers(self, kept: Collection[str], stored: Stored, place: Place, weights: Weights) -> Collection[str]:
        """Return the leaf names of tensors that must start again because W is about to be replaced.

        These are tensors that started from W and still have their initial values. Collective where `start` is.

        Args:
            kept: leaf names of the tensors that are not replaced together with W.
            stored: by leaf name; tensors may be sharded.
            place: the layer.
            weights: returns the old W.
        """
        return ()

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        """Return whether nothing was trained yet, as far as this rank's shards show.

        Return None if the values cannot tell.
        """
        return None

    # --- what it adds ---

    def of_layer(self, stored: Stored, place: Place) -> Stored:
        """Return the stored tensors with each shared tensor cut to the part that this layer uses."""
        return stored

    def acting_rank(self, rank: int) -> int:
        """Return the rank of the factors that `acting` returns for an option r of `rank`."""
        return rank

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        """Return the factors and the scale that stored tensors act as, differentiable in the trained ones.

        A forward calls it under the user's autocast. All else goes through `acting_exactly`, where autocast is off.

        Args:
            stored: by leaf name.
            weight: W as a matrix (out, in); a convolution's kernel is flattened. None if reads_weight is false, if the
                caller wants no scale, or if the layer has several weights. Return no scale then.
            scaling: s.
        """
        raise NotImplementedError

    def acting_exactly(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        """Return `acting`, computed outside the user's autocast, which would round its products to 16 bits."""
        with without_autocast(next(iter(stored.values())).device.type):
            return Acting(*self.acting(stored, weight, scaling))

    def blocks(self, stored: Stored, place: Place, read: Reader) -> dict[str, list[LowRankBlock]]:
        """Return the blocks that merging adds to each weight, without s, with the scale of each sum.

        Args:
            stored: by leaf name, not sharded.
            place: the layer.
            read: reads a weight part by part, as stored; called only if reads_weight is true.
        """
        if stored[self.trained[0]].dtype in low_rank.HALF:
            # `acting` would round its results to 16 bits, but W' must be rounded only once.
            stored = {leaf: tensor.float() for leaf, tensor in stored.items()}
        weight = None
        if self.reads_weight and len(place.shapes) == 1:
            (name,) = place.shapes
            matrix = torch.cat([part for _, part in read(name)])
            weight = low_rank.matrix_view(place.kind, matrix)
        a, b, scale = self.acting_exactly(self.of_layer(stored, place), weight, place.scaling)
        blocks = place.low_rank_blocks(a, b)
        if scale is None:
            return blocks
        return {name: scaled_blocks(blocks[name], scale, transposed=place.is_transposed) for name in blocks}

    def live_blocks(
        self, stored: Stored, place: Place, weights: Mapping[str, torch.Tensor], read: Reader
    ) -> dict[str, list[LowRankBlock]]:
        """Return `blocks` for the weights of a live layer. Collective where they are sharded.

        Override it to sum over the ranks what `blocks` computes from a whole weight, which `read` would gather.
        """
        return self.blocks(stored, place, read)

    # --- what it goes with ---

    @property
    def option(self) -> str:
        """The option by which a user asks for the variant, for messages."""
        return f"variant={self.name!r}"

    def conflict(self, config: Config) -> tuple[str, str] | None:
        """Return an option of LoRAConfig that conflicts with the variant and what it must be instead, or None.

        The message is "<option> must be <what it must be>".
        """
        if config.has_start and self.name not in _STARTED:
            return "init_lora_weights", f"one that does not start from the weight, with {self.option}"
        for option in ("enable_lora", "target_parameters") if self.reads_weight else ():
            if getattr(config, option):
                return option, f"left out with {self.option}, which adapts whole layers"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        """Return why the variant cannot adapt a module of this kind with these options, or "".

        inject puts the text between the name of the module and the advice to leave it out. A remedy in it begins with
        "; ".
        """
        if self.reads_weight and kind == low_rank.ATTENTION and getattr(module, low_rank.IN_PROJ, None) is None:
            return f"{self.option} cannot adapt attention with separate weights for q, k and v"
        return ""

    # --- apart from a model ---

    def options(self) -> dict[str, Any]:
        """Return the options of LoRAConfig that ask for this variant."""
        return {"variant": self.name}

    def rank(self, stored: Stored) -> int:
        """Return r of a layer. Shared tensors in `stored` are not cut to the layer.

        By default return the rank of the factors from `acting`. Override this if that rank is not r.
        """
        _, b, _ = self.acting_exactly(stored, None, 1.0)
        return b.shape[1]

    def fault(self, stored: Stored) -> Fault | None:
        """Return why a layer's stored tensors are invalid, or None. All are there and have a floating point dtype."""
        return None

    def expected(self, stored: Stored) -> Expected:
        """Return what a layer's tensors mean, for `merge --verify`.

        Override this without calling `acting`, so that the check finds mistakes in `acting`. The default calls it, and
        so finds none there.

        Args:
            stored: the result of of_layer.
        """
        wide = {leaf: value.detach().double() for leaf, value in stored.items()}
        a, b, _ = self.acting_exactly(wide, None, 1.0)
        return Expected([(a, b)], rounded=True)

    # --- in PEFT ---

    def peft_problem(self, kind: str) -> str:
        """Return why PEFT cannot express the adapter of a layer of this kind, or "". It follows the layer's name."""
        named = {*self.peft_leaves.values(), *self.peft_shared.values(), *self.frozen}
        if not self.peft_type or not named.issuperset(self.leaves):
            return f"has an adapter of the variant {self.title}, which PEFT does not have"
        if kind == low_rank.ATTENTION_OUTPUT and not self.peft_attention:
            return f"belongs to attention, which PEFT does not adapt with {self.option}"
        return ""


def variant_of(config: Config) -> Variant:
    """Return the variant that a LoRAConfig asks for."""
    known = _STARTED if config.has_start else KNOWN_VARIANTS
    return known[config.variant]


def variant_with(leaves: Collection[str]) -> Variant:
    """Return the named variant that stores the most of these leaf names and, among such, the fewest others.

    Plain LoRA is returned where no variant stores any of them.
    """
    wanted = set(leaves)
    named = [variant for variant in known_variants() if variant.name]
    return min(named, key=lambda variant: (len(wanted.difference(variant.leaves)), len(variant.leaves)))


def rows_leaf() -> str:
    """Return the leaf name of a table's trained rows."""
    return next(variant.trained[0] for variant in known_variants() if variant.replaces_rows)


def known_variants() -> list[Variant]:
    """Return all variants, also those without a name."""
    return list(_ALL.values())


def equals_start(live: torch.Tensor, start: torch.Tensor, tolerance: float = 0.0) -> bool:
    """Return whether a tensor still has its initial values, NaN included. Collective where it is sharded.

    Args:
        live: the tensor.
        start: its initial values, computed anew.
        tolerance: relative; for initial values whose last bits another device computes differently.
    """
    if live.is_meta or start.is_meta:
        return False
    live = full_tensor(live)
    return bool(torch.isclose(live, start.to(live.device, live.dtype), tolerance, 0.0, equal_nan=True).all())


def scaled_blocks(blocks: Iterable[LowRankBlock], scale: torch.Tensor, *, transposed: bool) -> list[LowRankBlock]:
    """Return blocks with a scale (out,). Each block must cover every output."""
    scale = scale.view(1, -1) if transposed else scale.view(-1, 1)
    return [block._replace(scale=scale) for block in blocks]
