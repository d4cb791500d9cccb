"""A variant of LoRA is one class: what an adapter stores, how that starts, and what it adds to the weight.

The same mapping `stored` (leaf name -> tensor) is in a live layer, in an adapter apart from any model and in a file.
Only the variant knows what its leaf names mean. Everybody else asks it, and names none.

To define a variant, subclass Variant in a file of its own and import that file. LoRAConfig(variant=name) then means it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from ..names import KNOWN_VARIANTS, PREFIX, register_leaf
from . import low_rank
from .low_rank import LowRankBlock

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

    def low_rank_blocks(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, list[LowRankBlock]]:
        """Return what B @ A adds to each weight, without the scaling; A and B as low_rank.py has them for the kind."""
        return low_rank.low_rank_blocks(self.kind, self.shapes, a, b, self.enabled)


class Acting(NamedTuple):
    """What stored tensors act as: W' = scale * (W + s * b @ a), the scale (out,) by outputs; None for no scale.

    `a` and `b` have the shapes that low_rank.py states for the kind of layer, with a rank of the variant's choice.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None


class Variant:
    """What one layer's adapter stores and what it adds. A variant has no state: one object serves all layers.

    Attributes:
        name: what LoRAConfig(variant=...) says; unique. "" for a variant that other options ask for.
        title: how people call it, as "DoRA".
        trained: leaf names of the tensors that are trained; each begins with "lora_". The last one gets a gradient from
            the first step on.
        frozen: leaf names of what is stored beside them.
        shared: leaf names of frozen tensors that all layers of a model share: one nn.Parameter, registered in each.
        started: A and B start from values that are subtracted again: asked for by init_lora_weights beside the name.
        reads_weight: `acting` gives a scale, and needs W for it.

    Example::

        class Plain(Variant):
            name, title = "plain", "plain LoRA"
            trained = ("lora_plain_a", "lora_plain_b")

            def shapes(self, place):
                return dict(zip(self.trained, place.factor_shapes()))

            def start(self, place, weights):
                a, b = self.shapes(place).values()
                return {"lora_plain_a": torch.randn(a), "lora_plain_b": torch.zeros(b)}

            def acting(self, stored, weight, scaling):
                return Acting(stored["lora_plain_a"], stored["lora_plain_b"])
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    started: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for leaf in (*cls.trained, *cls.frozen, *cls.shared):
            register_leaf(leaf, cls.role(leaf))
        variant = cls()
        _ALL[f"{cls.__module__}.{cls.__qualname__}"] = variant
        if not vars(cls).keys() & {"name", "started"} or not cls.name:
            return
        known = _STARTED if cls.started else KNOWN_VARIANTS
        other = type(known.get(cls.name, variant))
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.__qualname__}: the variant {cls.name!r} is {other.__module__}.{other.__qualname__}")
        known[cls.name] = variant

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    # --- what is stored ---

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaf names of all that a layer stores: trained, frozen, shared."""
        return (*self.trained, *self.frozen, *self.shared)

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

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        """Return whether nothing was trained yet, as far as this rank's shards show; None where values do not tell."""
        raise NotImplementedError

    # --- what it adds ---

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
        name = next(iter(place.shapes))
        weight = None
        if self.reads_weight and len(place.shapes) == 1:
            matrix = torch.cat([part for _, part in read(name)])
            weight = matrix.T if place.is_transposed else matrix
        a, b, scale = self.acting(stored, weight, place.scaling)
        blocks = place.low_rank_blocks(a, b)
        return blocks if scale is None else {name: scaled_blocks(blocks[name], scale, transposed=place.is_transposed)}

    # --- what it goes with ---

    @property
    def option(self) -> str:
        """How a user asks for it, for messages."""
        return f"variant={self.name!r}"

    def conflict(self, config: Config) -> tuple[str, str] | None:
        """Return an option that does not go with the variant, and what it must be instead; None where all go."""
        if config.has_start and self.name not in _STARTED:
            return "init_lora_weights", f"one that does not start from the weight, with {self.option}"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        """Return why the variant cannot adapt a module of this kind with these options, or ""."""
        return ""

    def layer_class(self, plain: LayerClass) -> LayerClass | None:
        """Return the class of a kind of layer with a faster forward for this variant; None for a kind without one."""
        return plain


def variant_of(config: Config) -> Variant:
    """Return the variant that options ask for."""
    known = _STARTED if config.has_start else KNOWN_VARIANTS
    return known[config.variant]


def known_variants() -> list[Variant]:
    """Return all variants that a layer's adapter can be of, also those that have no name."""
    return list(_ALL.values())


def scaled_blocks(blocks: Iterable[LowRankBlock], scale: torch.Tensor, *, transposed: bool) -> list[LowRankBlock]:
    """Return blocks that hold every output, with the scale (out,) of each."""
    scale = scale.view(1, -1) if transposed else scale.view(-1, 1)
    return [block._replace(scale=scale) for block in blocks]
