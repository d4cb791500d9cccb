"""A variant of LoRA is one class: what an adapter stores, how that starts, and what it adds to the weight.

The same mapping `stored` (leaf name -> tensor) is in a live layer, in an adapter apart from any model and in a file.
Only the variant knows what its leaf names mean. Everybody else asks it, and names none.

To define a variant, subclass Variant in a file of its own and import that file. LoRAConfig(variant=name) then means it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from ..distributed.sharding import full_tensor
from ..errors import LoRAError
from ..names import KNOWN_VARIANTS, PREFIX, register_leaf
from . import low_rank
from .low_rank import LowRankBlock
from .peft_form import PeftForm

Config = Any  # a LoRAConfig; its file stands above this one
LayerClass = TypeVar("LayerClass", bound=type[nn.Module])
Stored = Mapping[str, torch.Tensor]  # tensors of one layer's adapter, by leaf name
Weights = Callable[[], Mapping[str, torch.Tensor]]  # gives a layer's weights as stored, by name, when they are needed
Parts = Iterable[tuple[int, torch.Tensor]]  # some of a weight's rows as a matrix, each with the number of the first
Reader = Callable[[str], Parts]  # reads the weight of this name part by part

_STARTED: dict[str, Variant] = {}  # by name: the variants whose factors start from values that are subtracted again
_ALL: dict[str, Variant] = {}  # by the class's name


@dataclass(frozen=True)
class Place:
    """One adapted layer or single parameter, as its variant sees it: in a live model and in files.

    Attributes:
        name: in the model.
        kind: one of low_rank.KINDS.
        shapes: of its weights as stored, by name.
        rank: r.
        scaling: s.
        enabled: which equal parts of a fused projection are adapted; None for all of it as one.
        init: LoRAConfig's init_lora_weights.
        seed: what random values are drawn from.
        rows: of a table of which rows are trained: their numbers, ascending.
        options: those that the variant alone has, by name.
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
        """Whether A is a table that rows are taken from."""
        return self.kind == low_rank.EMBEDDING

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.kind in low_rank.TRANSPOSED

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B of plain LoRA."""
        return low_rank.factor_shapes(self.kind, self.shapes, self.rank, self.enabled)

    def matrix_shape(self) -> tuple[int, int]:
        """Return (out, in) of its weight, of a convolution with its kernel counted to in."""
        return low_rank.matrix_shape(self.kind, next(iter(self.shapes.values())))

    def shaped(self, acting: Acting) -> Acting:
        """Return what a layer acts as; a convolution's factors, where they are matrices, as low_rank.py states."""
        a, b, scale = acting
        if self.kind not in low_rank.CONVOLUTIONS or a.dim() > 2:
            return acting
        kernel = next(iter(self.shapes.values()))[1:]
        return Acting(a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1)), scale)

    def low_rank_blocks(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, list[LowRankBlock]]:
        """Return what B @ A adds to each weight, without the scaling; A and B as low_rank.py has them for the kind."""
        return low_rank.low_rank_blocks(self.kind, self.shapes, a, b, self.enabled)


class Acting(NamedTuple):
    """What stored tensors act as: W' = scale * (W + s * b @ a), the scale (out,) by outputs; None for no scale.

    `a` and `b` have the shapes that low_rank.py states for the kind of layer, with a rank of the variant's choice. A
    convolution's may also be matrices, (rank, in * kernel) and (out, rank).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None


class Fault(NamedTuple):
    """Why the tensors of a layer do not go together.

    `text` follows the layer's name and a colon, as "A and B do not share a rank". With a leaf name it follows the name
    of that tensor and "must be", as "32 floating point values".
    """

    text: str
    leaf: str = ""


class Expected(NamedTuple):
    """What a layer's tensors mean, for a check that shares no arithmetic with merging.

    W' = W + s * (the sum of b @ a over the pairs). Where lengths are given, each output's weights then get that length.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # a and b of each, float64, in the shapes that low_rank.py states
    lengths: torch.Tensor | None = None  # (out,)
    rounded: bool = False  # merging computes the pairs from what is stored, in float32 or better


class Variant(PeftForm):
    """What one layer's adapter stores and what it adds. A variant has no state: one object serves all layers.

    Its form in PEFT is said by what it inherits from PeftForm.

    Attributes:
        name: what LoRAConfig(variant=...) says; unique. "" for a variant that other options ask for.
        title: how people call it, as "LoRA"; by default its name.
        trained: leaf names of the tensors that are trained; each begins with "lora_". The last one gets a gradient from
            the first step on.
        frozen: leaf names of what is stored beside them.
        shared: leaf names of frozen tensors that all layers of a model share: one nn.Parameter, registered in each.
        placed_as: by leaf name, the factor of plain LoRA, "lora_A" or "lora_B", that a tensor parallel plan splits a
            tensor like. A layer with another tensor refuses such a plan.
        follows_weight: some tensors start from W's values, see `followers`.
        started: A and B start from values that are subtracted again: asked for by init_lora_weights beside the name.
        scaled: s is lora_alpha / r; without it, s is 1 and lora_alpha means nothing.
        own_options: the options that it alone has (LoRAConfig's variant_options), each with its default.
        replaces_rows: it is of a table, of which it stores some rows as they are now.
        reads_weight: `acting` gives a scale, and needs W for it. Such adapters cannot be combined.
        scale_title: how people call what the scale comes from, in the plural; for sentences about B @ A alone.

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
    leaves: ClassVar[tuple[str, ...]] = ()  # of all that a layer stores
    placed_as: ClassVar[Mapping[str, str]] = {}
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
        if "peft_type" not in own:  # one that stores the same as its parent may mean another thing by it
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
        """Return what a stored tensor is in the adapter, as "A": param groups and statistics go by it."""
        return leaf.removeprefix(PREFIX)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the trained and frozen tensors of a layer, by leaf name."""
        raise NotImplementedError

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        """Return the initial values of the trained and frozen tensors, the same each time.

        Args:
            place: the layer; random values are drawn from its seed alone, on the CPU.
            weights: returns the layer's weights; collective where they are sharded, so call it on all ranks or none.
        """
        raise NotImplementedError

    def start_shared(self, places: Iterable[Place], seed: int) -> dict[str, torch.Tensor]:
        """Return the values of the shared tensors of a model, large enough for each of its layers."""
        return {}

    def needs_values(self, place: Place) -> bool:
        """Return whether `start` refuses a weight without values, as one on the meta device."""
        return False

    def followers(self, kept: Collection[str], stored: Stored, place: Place, weights: Weights) -> Collection[str]:
        """Return the leaf names of tensors that W made what they are: they follow a new W. Collective as `start`.

        Args:
            kept: leaf names of what is not replaced together with W.
            stored: by leaf name, perhaps sharded.
            place: the layer.
            weights: returns W as it was so far.
        """
        return ()

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        """Return whether nothing was trained yet, as far as this rank's shards show; None where values do not tell."""
        return None

    # --- what it adds ---

    def of_layer(self, stored: Stored, place: Place) -> Stored:
        """Return what one layer sees of its stored tensors: of shared ones, which serve larger layers too, its part."""
        return stored

    def acting_rank(self, rank: int) -> int:
        """Return the rank of the factors that `acting` gives, for the r of the options."""
        return rank

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        """Return the factors and the scale that stored tensors act as, differentiable in what is trained.

        Args:
            stored: by leaf name.
            weight: W (out, in), of a convolution with its kernel flattened; None where reads_weight is false, where the
                scale is not wanted, or where a layer has several weights. The scale is left out then.
            scaling: s.
        """
        raise NotImplementedError

    def blocks(self, stored: Stored, place: Place, read: Reader) -> dict[str, list[LowRankBlock]]:
        """Return what is added to each weight, without s, and the scale of each sum: what merging writes.

        Args:
            stored: by leaf name, whole.
            place: the layer.
            read: gives a weight part by part, as stored; called where reads_weight is true.
        """
        if stored[self.trained[0]].dtype in low_rank.HALF:
            # In 16 bits `acting` would round what it computes, and W' is to be rounded once.
            stored = {leaf: tensor.float() for leaf, tensor in stored.items()}
        weight = None
        if self.reads_weight and len(place.shapes) == 1:
            (name,) = place.shapes
            matrix = torch.cat([part for _, part in read(name)])
            weight = matrix.T if place.is_transposed else matrix
        a, b, scale = self.acting(self.of_layer(stored, place), weight, place.scaling)
        blocks = place.low_rank_blocks(a, b)
        if scale is None:
            return blocks
        return {name: scaled_blocks(blocks[name], scale, transposed=place.is_transposed) for name in blocks}

    # --- what it goes with ---

    @property
    def option(self) -> str:
        """How a user asks for it, for messages."""
        return f"variant={self.name!r}"

    def conflict(self, config: Config) -> tuple[str, str] | None:
        """Return an option that does not go with the variant, and what it must be instead; None where all go."""
        if config.has_start and self.name not in _STARTED:
            return "init_lora_weights", f"one that does not start from the weight, with {self.option}"
        for option in ("enable_lora", "target_parameters") if self.reads_weight else ():
            if getattr(config, option):
                return option, f"left out with {self.option}, which adapts whole layers"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        """Return why the variant cannot adapt a module of this kind with these options, or ""."""
        if self.reads_weight and kind == low_rank.ATTENTION and getattr(module, low_rank.IN_PROJ, None) is None:
            return f"{self.option} is not for attention whose q, k and v are apart"
        return ""

    def layer_class(self, plain: LayerClass) -> LayerClass | None:
        """Return the class of a kind of layer with a faster forward for this variant; None for a kind without one."""
        return plain

    # --- apart from a model ---

    def options(self) -> dict[str, Any]:
        """Return the options of LoRAConfig that ask for it."""
        return {"variant": self.name}

    def rank(self, stored: Stored) -> int:
        """Return r of a layer; of shared tensors `stored` has the whole.

        This default is the rank of `acting`: override it where that is another.
        """
        _, b, _ = self.acting(stored, None, 1.0)
        return b.shape[1]

    def fault(self, stored: Stored) -> Fault | None:
        """Return why a layer's tensors do not go together, or None; all are there and hold numbers."""
        return None

    def expected(self, stored: Stored) -> Expected:
        """Return what a layer's tensors mean, for `merge --verify`: apart from `acting`, so that mistakes are found.

        Of shared tensors `stored` has what of_layer returns. This default goes by `acting`, and tells nothing of a
        mistake there.
        """
        a, b, _ = self.acting({leaf: value.detach().double() for leaf, value in stored.items()}, None, 1.0)
        return Expected([(a, b)], rounded=True)

    # --- in PEFT ---

    def peft_problem(self, kind: str) -> str:
        """Return why PEFT has no adapter like that of a layer of this kind, or "". It follows the layer's name."""
        named = {*self.peft_leaves.values(), *self.peft_shared.values(), *self.frozen}
        if self.peft_type and named.issuperset(self.leaves):
            return ""
        return f"has an adapter of the variant {self.title}, which PEFT does not have"


def variant_of(config: Config) -> Variant:
    """Return the variant that options ask for."""
    known = _STARTED if config.has_start else KNOWN_VARIANTS
    return known[config.variant]


def variant_with(leaves: Collection[str]) -> Variant:
    """Return the variant that stores all these, or most of them, and the fewest others; plain LoRA where none does."""
    wanted = set(leaves)
    named = [variant for variant in known_variants() if variant.name]
    return min(named, key=lambda variant: (len(wanted.difference(variant.leaves)), len(variant.leaves)))


def rows_leaf() -> str:
    """Return the leaf name of the trained rows of a table."""
    return next(variant.trained[0] for variant in known_variants() if variant.replaces_rows)


def known_variants() -> list[Variant]:
    """Return all variants that a layer's adapter can be of, also those that have no name."""
    return list(_ALL.values())


def equals_start(live: torch.Tensor, start: torch.Tensor) -> bool:
    """Return whether a tensor is what it started as, bit for bit. Collective where it is sharded."""
    if live.is_meta or start.is_meta:
        return False
    live = full_tensor(live)
    start = start.to(live.device, live.dtype)
    return bool(((live == start) | (live.isnan() & start.isnan())).all())


def scaled_blocks(blocks: Iterable[LowRankBlock], scale: torch.Tensor, *, transposed: bool) -> list[LowRankBlock]:
    """Return blocks that hold every output, with the scale (out,) of each."""
    scale = scale.view(1, -1) if transposed else scale.view(-1, 1)
    return [block._replace(scale=scale) for block in blocks]
