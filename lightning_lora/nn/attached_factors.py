"""Frozen adapters attached to a layer: W' = c * (W + s * B @ A) + the sum of w_i * s_i * B_i @ A_i.

A layer has all of them as one packed pair, the ranks side by side in the order of their names, and w_i * s_i of each
rank as a vector. A new strength is written into that vector, so nothing is compiled anew. The tensors are plain ones:
as parameters they would be in state_dict(), and as buffers DDP would send them at each forward and an average would
change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..distributed.sharding import is_sharded
from ..names import parent_names
from . import low_rank
from .low_rank import LowRankBlock

LACKING = "lora_beside"  # key in a state dict's metadata, which names the attached adapters that it does not hold
TINY = 1e-30  # stands in for a scale c of exactly 0, by which attached adapters would be divided

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AttachedFactors:
    """One attached adapter in one layer.

    Attributes:
        a: A, in the shape that low_rank.py states for the kind of layer, of the layer as a whole.
        b: B, likewise.
        scaling: s.
        strength: w, by which the user weakens or strengthens it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    strength: float


@dataclass(frozen=True)
class Attachment:
    """An attached adapter.

    Attributes:
        strength: by which it is multiplied.
        fingerprint: a digest of its factors and scalings, which tells it from another adapter of the same name.
    """

    strength: float
    fingerprint: str


class Share(NamedTuple):
    """What an attached adapter has of a packed pair."""

    rank: int
    scaling: float
    strength: float


class Packed:
    """The attached adapters of one layer as one pair.

    Attributes:
        shares: of each adapter, by name, in the order of names.
        a: A (R, in) for the sum R of all ranks; other kinds of layers as low_rank.py states.
        b: B (out, R).
        scales: w_i * s_i of each rank (R,), for forwards.
        exact_scales: the same in float64 on the CPU, for merging.
        inside: the strengths that `scaled` has set until its block ends, by name.
        read: a forward has read the factors since adapters were last attached or detached, or a warning has named the
            layer. Where the model reads the layer's weight under another name, they act merged and not factored.
    """

    def __init__(self, attached: Mapping[str, AttachedFactors]) -> None:
        """Pack at least one adapter. The tensors are copied."""
        named = dict(sorted(attached.items()))
        self.shares = {name: Share(each.b.shape[1], each.scaling, each.strength) for name, each in named.items()}
        (first, *others), device = named.values(), next(iter(named.values())).a.device
        with torch.inference_mode(False), torch.no_grad():
            a, b = first.a.clone(), first.b.clone()
            for each in others:
                a, b = low_rank.stack_ranks(a, b, each.a, each.b)
            self.a, self.b = a.contiguous(), b.contiguous()
            self.scales = torch.empty(self.rank, dtype=torch.promote_types(b.dtype, torch.float32), device=device)
            self.exact_scales = torch.empty(self.rank, dtype=torch.float64, device="cpu")
        self.copies: dict[torch.device, Tensors] = {}
        self.inside: dict[str, float] = {}
        self.read = False
        self._write_scales_()

    def __getstate__(self) -> dict[str, object]:
        state = vars(self) | {"copies": {}, "inside": {}}
        if self.inside:  # a copy made inside `scaled` is the model as it is outside of the block
            exact = self._scales_of({})
            state |= {"exact_scales": exact, "scales": exact.to(self.scales.device, self.scales.dtype)}
        return state

    @property
    def rank(self) -> int:
        """The sum of all ranks."""
        return self.b.shape[1]

    def unpacked(self) -> dict[str, AttachedFactors]:
        """Return each adapter by itself. Its tensors may share memory with the pair."""
        ranks = [share.rank for share in self.shares.values()]
        parts = self.a.reshape(-1, self.rank, *self.a.shape[1:]).split_with_sizes(ranks, 1)  # the experts of a stack
        pairs = zip(parts, self.b.split_with_sizes(ranks, 1), strict=True)
        return {
            name: AttachedFactors(a.flatten(0, 1), b, share.scaling, share.strength)
            for (name, share), (a, b) in zip(self.shares.items(), pairs, strict=True)
        }

    def set_strength_(self, name: str, strength: float) -> None:
        """Give an adapter another strength. In place."""
        self.shares[name] = self.shares[name]._replace(strength=strength)
        self._write_scales_()

    def act_with_(self, inside: Mapping[str, float]) -> None:
        """Let adapters act with other strengths inside of `scaled`, which no copy has. In place."""
        self.inside = {name: strength for name, strength in inside.items() if name in self.shares}
        self._write_scales_()

    def _scales_of(self, inside: Mapping[str, float]) -> torch.Tensor:
        named = self.shares.items()
        values = [inside.get(name, each.strength) * each.scaling for name, each in named for _ in range(each.rank)]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def _write_scales_(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.exact_scales.copy_(self._scales_of(self.inside))
            for scales in (self.scales, *(copy[2] for copy in self.copies.values())):
                scales.copy_(self.exact_scales)

    # --- in a forward ---

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and w s B on a device."""
        self.read = True  # written and not asked, which would be a guard of a compiled forward
        tensors = (self.a, self.b, self.scales)
        if self.a.device != device:
            # Copies are kept: fully_shard and others move no plain tensors, so each forward would copy them anew.
            here = self.copies.get(device)
            tensors = (self.a.to(device), self.b.to(device), self.scales.to(device)) if here is None else here
            if device.type != "meta":
                self.copies[device] = tensors
        a, b, scales = tensors
        return a, b * scales.view(1, -1, *[1] * (b.dim() - 2))

    def factors_like(self, x: torch.Tensor, kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and w s B on the device of a layer's input; where that is a DTensor, split like the weight."""
        a, b = self.factors(x.device)
        if is_sharded(x):
            from ..distributed.tensor_parallel import split_like  # imported here: slow to import, rarely needed

            dims = low_rank.shard_dims(kind)
            a, b = split_like("lora_A", a, weight, dims), split_like("lora_B", b, weight, dims)
        return a, b

    def move_(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move the tensors to the device to which torch moves those of the layer. In place.

        They keep their values: none is rounded, to_empty would give memory without values, and a move to the meta
        device would take them away.
        """
        moved = move(torch.empty(0, dtype=self.b.dtype, device=self.b.device))
        self.copies.clear()
        if not moved.is_meta:
            dtype = torch.float64 if moved.dtype == torch.float64 else None
            self.a, self.b = self.a.to(moved.device, dtype), self.b.to(moved.device, dtype)
            self.scales = self.scales.to(moved.device, dtype)
            self._write_scales_()

    def mark_as_lacking(self, state_dict: Mapping[str, object], prefix: str) -> None:
        """Let a state dict's metadata name the adapters, for the layer and each module around it. In place."""
        metadata = getattr(state_dict, "_metadata", {})
        for path in ("", *parent_names(prefix)):
            if path in metadata:
                metadata[path][LACKING] = sorted({*metadata[path].get(LACKING, ()), *self.shares})

    # --- in a merge ---

    def blocks(self, kind: str, shape: torch.Size, device: torch.device) -> list[LowRankBlock]:
        """Return the blocks that are added to the whole weight. w s is in them, in float64."""
        b = self.b.to(device, low_rank.widest_dtype(device))
        scaled = b * self.exact_scales.to(device, b.dtype).view(1, -1, *[1] * (b.dim() - 2))
        return low_rank.low_rank_blocks(kind, shape, self.a.to(device), scaled)


def add_attached(own: list[LowRankBlock], attached: list[LowRankBlock], scaling: float) -> list[LowRankBlock]:
    """Return the blocks of both sums together, with each scaling multiplied into the left factors.

    Args:
        own: blocks of the trained adapter. Each lies inside of a block of `attached`. Their scale c acts on W and on
            the trained adapter, and not on attached ones.
        attached: from Packed.blocks.
        scaling: s of the trained adapter.
    """
    joined = []
    for outer in attached:
        left, right, scale = outer.left.to(low_rank.widest_dtype(outer.left.device)), outer.right, None
        if own and own[0].scale is not None:  # of the whole weight
            scale = own[0].scale.to(left.dtype)
            scale = torch.where(scale == 0, TINY, scale)
            # c acts on the sum of both, so what is attached is divided by it first.
            if scale.shape[0] == len(left):
                left = left / scale
            else:
                right = right / scale
        lefts, rights = [left], [right]
        for block in own:
            above, before = block.row - outer.row, block.col - outer.col
            if not (0 <= above < len(left) and 0 <= before < right.shape[1]):
                continue
            # Zeros around it, where the block is that of a part of a fused projection.
            rows, columns = len(left) - len(block.left), right.shape[1] - block.right.shape[1]
            scaled = block.left.to(left.dtype) * scaling
            lefts.append(F.pad(scaled, (0, 0, above, rows - above)) if rows else scaled)
            rights.append(F.pad(block.right, (before, columns - before)) if columns else block.right)
        joined.append(LowRankBlock(outer.row, outer.col, torch.cat(lefts, 1), torch.cat(rights), scale))
    return joined
