"""LoRALayer: what every adapted layer has in common, and the class swap that makes one.

Invariants, for every adapted layer:
    - its class is a subclass of the class it had; module tree, names, parameter objects and storage stay;
    - lora_active False means: run the base class's own forward and nothing else;
    - lora_merged with lora_kept means that `weight` holds W'; lora_merged without it, that the layer stays factored.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from .errors import LoRAError
from .exact import Kept, Observer, Piece, add_delta_, merged_weight, remove_delta_, restored

A, B = "lora_A", "lora_B"


class Swapped(nn.Module):
    """A module whose class was replaced by a subclass made for it; pickle and deepcopy rebuild that subclass.

    Attributes:
        lora_mixin, lora_base: the two classes that the subclass combines.
    """

    lora_mixin: ClassVar[type[Swapped]]
    lora_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *rest)
        return (make, args, *rest)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """The one subclass of a pair of mixin and base class."""
    return _CLASSES.get((mixin, base)) or _CLASSES.setdefault((mixin, base), _make_class(mixin, base))


_CLASSES: dict[tuple[type, type], type[Swapped]] = {}


def _make_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    own = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_mixin": mixin, "lora_base": base}
    return type(f"LoRA{base.__name__}", (mixin, base), own)


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)


class LoRALayer(Swapped):
    """Mixed in front of a layer's own class; a subclass says how B @ A maps to the weight (arXiv:2106.09685).

    Attributes:
        lora_A, lora_B: the factors, shapes as the subclass states.
        lora_r, lora_alpha, lora_scaling, lora_dropout: their options.
        lora_own_forward: the class has a forward of its own, which is run on W + delta.
        lora_enabled: which equal parts of a fused projection are adapted, or None.
        lora_active: whether forward applies the adapter.
        lora_merged, lora_kept: whether merge was called, and what undoing it needs.
        lora_damaged: unmerging failed, so the weight is not known to be W.
        lora_tied: the other owner of the weight, or "".
        lora_reported: the cost of rounding W' was reported.
    """

    KNOWN_FORWARD: ClassVar[tuple[str, ...]] = ("forward",)
    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_r: int
    lora_alpha: float
    lora_scaling: float
    lora_dropout: float
    lora_own_forward: bool
    lora_enabled: tuple[bool, ...] | None
    lora_active: bool
    lora_merged: bool
    lora_kept: Kept | None
    lora_damaged: bool
    lora_tied: str
    lora_reported: bool

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
        """W + delta stands in for the weight, for code that reads it."""
        weight: nn.Parameter = self.weight
        factor: torch.Tensor = self.lora_A
        if self.lora_dropout and self.training:
            mask = factor.new_ones(1, factor.shape[1], *[1] * (factor.dim() - 2))
            factor = factor * F.dropout(mask, self.lora_dropout)
        total = weight.to(torch.promote_types(weight.dtype, factor.dtype)) + self.delta(factor, self.lora_B)
        try:
            self._parameters["weight"] = cast(nn.Parameter, total.to(weight.dtype))
            yield
        finally:
            self._parameters["weight"] = weight

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        raise NotImplementedError

    def pieces(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> list[Piece]:
        """How the factors make up the weight's delta, without the scaling."""
        raise NotImplementedError

    def delta(self, factor_a: torch.Tensor, factor_b: torch.Tensor) -> torch.Tensor:
        """s * B @ A in the weight's shape and the factors' dtype, differentiable."""
        pieces = self.pieces(factor_a, factor_b)
        if len(pieces) == 1 and pieces[0].left.shape[0] * pieces[0].right.shape[1] == self.weight.numel():
            return (pieces[0].left @ pieces[0].right).view(self.weight.shape) * self.lora_scaling
        delta = factor_a.new_zeros(self.weight.shape[0], self.weight[0].numel())
        for row, col, left, right in pieces:
            delta[row : row + left.shape[0], col : col + right.shape[1]] = left @ right
        return delta.view(self.weight.shape) * self.lora_scaling

    def stays_factored(self) -> str:
        """Why merging would be wrong for this layer, or ''."""
        return f"its weight is also {self.lora_tied}" if self.lora_tied else ""

    def merge_(self, *, copy: bool, observe: Observer | None = None) -> None:
        """weight <- W', see exact.add_delta_."""
        if self.lora_kept is None:
            pieces = self.pieces(self.lora_A, self.lora_B)
            self.lora_kept = add_delta_(self.weight, pieces, self.lora_scaling, copy=copy, observe=observe)
        self.lora_active, self.lora_merged = False, True

    def unmerge_(self) -> None:
        """weight <- W, see exact.remove_delta_."""
        failure = None
        if self.lora_kept is not None:
            try:
                remove_delta_(self.weight, self.lora_kept)
            except LoRAError as error:
                failure = error
            self.lora_kept, self.lora_damaged = None, failure is not None
        self.lora_active, self.lora_merged = True, False
        if failure:
            raise failure

    @contextmanager
    def briefly_unmerged(self) -> Iterator[None]:
        """Unmerged inside, so that what changes the weight there (a move, a cast, a load) changes W."""
        kept = self.lora_kept
        if kept is None:
            yield
            return
        self.unmerge_()
        yield
        self.merge_(copy=kept.copy is not None)

    def original_weight(self) -> torch.Tensor:
        """W, detached: the live weight, or a restored copy of it while merged."""
        if self.lora_damaged:
            raise LoRAError(
                f"{type(self).__name__}: its base weight could not be restored after merging, so nothing is saved "
                "from it; load the base weights again"
            )
        return self.weight.detach() if self.lora_kept is None else restored(self.weight, self.lora_kept)

    def merged_copy(self, weight: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor) -> torch.Tensor:
        """W' for the given W, A and B, as a new tensor."""
        return merged_weight(weight, self.pieces(factor_a, factor_b), self.lora_scaling)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        with self.briefly_unmerged():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_kept is not None or self.lora_damaged:
            destination[prefix + "weight"] = self.original_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self.briefly_unmerged():
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.lora_damaged = self.lora_damaged and prefix + "weight" not in state_dict

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = super().__reduce_ex__(protocol)
        if self.lora_kept is not None and isinstance(rest[0], dict):
            # Another machine may compute other last bits: hand over a plain copy.
            rest[0] = rest[0] | {"lora_kept": Kept([], copy=self.original_weight())}
        return (make, args, *rest)


def strip_(layer: LoRALayer) -> None:
    """The inverse of adapt_: the class it had, no factors, no attributes; the weight stays as it is."""
    layer.__class__ = layer.lora_base  # type: ignore[assignment]
    for name in (A, B):
        layer._parameters.pop(name, None)
    for name in [name for name in vars(layer) if name.startswith("lora_")]:
        delattr(layer, name)
