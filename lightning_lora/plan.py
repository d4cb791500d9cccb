"""What merging an adapter does to each tensor of a base on disk. Everything is checked before anything is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapter import Adapter, placed
from .base import A, B, LoRALayer
from .config import LoRAConfig
from .errors import LoRAError
from .exact import Piece, merged_weight
from .kinds import IN_PROJ, SEPARATE, stand_in
from .places import print_at
from .state import compare_fingerprints
from .weights import Weights

MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INSTEAD = "Load model and adapter in Python and use merge_and_unload instead"


@dataclass(frozen=True)
class Change:
    """New values of one tensor: scaling * pieces are added to it, or `value` takes its place."""

    pieces: Sequence[Piece] = ()
    scaling: float = 0.0
    value: torch.Tensor | None = None

    def applied(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """The new values of some rows, in the dtype of the old."""
        if self.value is not None:
            return (self.value[first : first + rows.shape[0]] if rows.dim() else self.value).to(rows.dtype)
        pieces = within(self.pieces, first, rows.shape[0])
        return merged_weight(rows, pieces, self.scaling) if pieces else rows


def within(pieces: Sequence[Piece], first: int, count: int) -> list[Piece]:
    """The parts of pieces that fall on some rows, counted from the first of these."""
    parts = []
    for piece in pieces:
        start, end = max(piece.row, first), min(piece.row + piece.left.shape[0], first + count)
        if start < end:
            left = piece.left[start - piece.row : end - piece.row]
            parts.append(Piece(start - first, piece.col, left, piece.right))
    return parts


def plan(adapter: Adapter, base: Weights, *, strict_base: bool = True) -> dict[str, Change]:
    """The changes, by the base's tensor names.

    Raises:
        LoRAError: the adapter does not fit the base, or merged weights cannot express it.
    """
    if any(name.rpartition(".")[2] in (A, B) for name in base.places):
        raise LoRAError(f"{base.path}: the base holds an adapter itself; give the weights that it was trained on.")
    adapter = placed(adapter, base.modules(), str(base.path))
    _compare_base(adapter, base, strict_base)
    changes: dict[str, Change] = {}
    seen = _seen_orientations(adapter, base)
    for name in adapter.layers():
        changes |= _layer_changes(adapter, name, base, seen)
    for name, value in adapter.tensors.items():
        if name.rpartition(".")[2] not in (A, B):
            changes[name] = _replacement(name, value, base)
    owners = base.other_owners()
    for name in changes:
        owner = owners.get(name)
        if owner:
            raise LoRAError(
                f"{base.path}: {name!r} is also {owner}, so changing it would change that too, and merged weights "
                "cannot express the adapter. Leave the layer out of the adapter, or keep the adapter separate."
            )
    return changes


def _compare_base(adapter: Adapter, base: Weights, strict: bool) -> None:
    """By the names that both have: a file may hold tied weights once, or experts under other names than a model."""
    common = {name: entry for name, entry in adapter.fingerprint.items() if name in base.places}
    readable = {name: entry for name, entry in common.items() if base.places[name].in_order}
    try:
        compare_fingerprints({name: print_at(base.places[name]) for name in readable}, readable)
    except LoRAError as error:
        if strict:
            raise
        warnings.warn(f"lightning_lora: {error}", stacklevel=3)


def _layer_changes(adapter: Adapter, name: str, base: Weights, seen: Mapping[str, str]) -> dict[str, Change]:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    leaves = [leaf for leaf in ("weight", IN_PROJ, *SEPARATE) if f"{name}.{leaf}" in base.places]
    shapes = {leaf: base.places[f"{name}.{leaf}"].shape for leaf in leaves}
    if not shapes:
        raise LoRAError(f"{base.path}: {name!r}, which the adapter changes, has no weight there. {INSTEAD}.")
    for leaf in leaves:
        dtype = base.places[f"{name}.{leaf}"].dtype
        if dtype not in MERGEABLE:
            raise LoRAError(f"{base.path}: {f'{name}.{leaf}'!r} is {dtype}; only floating point weights are merged.")
    kind = adapter.kinds.get(name) or _kind(adapter, name, shapes, base, seen)
    config = adapter.config or LoRAConfig()
    layer = stand_in(kind, shapes, b.shape[1], config.enabled_parts(name))
    expected = _expected(layer)
    if expected != (tuple(a.shape), tuple(b.shape)):
        raise LoRAError(
            f"{base.path}: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a {kind} layer whose weights "
            f"have shape {', '.join(map(str, shapes.values()))}; the adapter belongs to another base."
        )
    pieces = layer.pieces(a, b)
    return {f"{name}.{leaf}": Change(pieces[leaf], adapter.scalings[name]) for leaf in pieces}


def _expected(layer: LoRALayer) -> Any:
    try:
        return layer.factor_shapes()
    except (ValueError, IndexError):  # a weight of another number of dimensions
        return None


def _kind(
    adapter: Adapter, name: str, shapes: Mapping[str, Sequence[int]], base: Weights, seen: Mapping[str, str]
) -> str:
    """Linear, Conv1D or attention, for an adapter of which only names and shapes are known."""
    if "weight" not in shapes:
        return "MultiheadAttention"
    fits = _orientations(adapter, name, shapes["weight"])
    if len(fits) < 2:
        return next(iter(fits), "Linear")
    said, opposite = ("Conv1D", "Linear") if adapter.fan_in_fan_out else ("Linear", "Conv1D")
    if opposite in seen:
        raise LoRAError(
            f"{base.path}: {name!r} is square, so that its shape does not tell whether it is stored (out, in) or "
            f"(in, out), and the adapter's fan_in_fan_out={adapter.fan_in_fan_out} is contradicted by "
            f"{seen[opposite]!r}. {INSTEAD}."
        )
    return said


def _seen_orientations(adapter: Adapter, base: Weights) -> dict[str, str]:
    """Linear and Conv1D, each with the first layer of unknown kind whose shape says that it is one."""
    seen: dict[str, str] = {}
    for name in adapter.layers():
        place = base.places.get(f"{name}.weight")
        fits = _orientations(adapter, name, place.shape) if place and name not in adapter.kinds else set()
        if len(fits) == 1:
            seen.setdefault(fits.pop(), name)
    return seen


def _orientations(adapter: Adapter, name: str, shape: Sequence[int]) -> set[str]:
    outs, ins = adapter.tensors[f"{name}.{B}"].shape[0], adapter.tensors[f"{name}.{A}"].shape[1]
    return {kind for kind, fit in (("Linear", (outs, ins)), ("Conv1D", (ins, outs))) if tuple(shape) == fit}


def _replacement(name: str, value: Any, base: Weights) -> Change:
    """A parameter that was trained whole, or a buffer."""
    place = base.places.get(name)
    if place is None:
        raise LoRAError(
            f"{base.path}: the adapter comes with {name!r}, trained whole, and the base has no such tensor. {INSTEAD}."
        )
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != place.shape:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoRAError(f"{base.path}: {name!r} has shape {place.shape}, in the adapter {found}.")
    if value.is_floating_point() != place.dtype.is_floating_point:
        raise LoRAError(f"{base.path}: {name!r} is {place.dtype}, in the adapter {value.dtype}.")
    if value.is_floating_point() and not math.isfinite(float(value.double().sum())):
        raise LoRAError(f"adapter: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")
    return Change(value=value)
