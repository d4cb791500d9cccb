"""What turns a weight that was computed back into the bits that it had: a few small steps, kept in two bytes each.

A scaled weight that is divided and subtracted back is off in a few per cent of its elements, most of them by one unit
in the last place (ulp). A position and a value of each would take 6 to 8 bytes. Here each takes a byte for the distance
from the one before it and a byte for how many ulp it is off; where more than 255 elements lie between two, entries
that change nothing fill the gap. What is off by more than 127 ulp keeps its position and its value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integers of floating point values
LONGEST_GAP, MOST_ULP = 255, 127


class Corrections(NamedTuple):
    """Where and how a tensor differs from what was computed for it."""

    gaps: torch.Tensor  # uint8 (n,): elements since the entry before
    ulps: torch.Tensor  # int8 (n,): added to the bits, seen as ordered integers
    positions: torch.Tensor  # int32 (m,): of what is further off
    values: torch.Tensor  # (m,): of these


def find_corrections(weight: torch.Tensor, computed: torch.Tensor, changed: torch.Tensor) -> Corrections:
    """Return what correct_ needs to turn `computed` into `weight`.

    Args:
        weight: any shape, floating point.
        computed: the same shape and dtype.
        changed: int64, ascending positions in the flattened tensors of elements with other bits.
    """
    bits = BITS[weight.element_size()]
    values = weight.flatten().index_select(0, changed)
    ulps = _ordered(values.view(bits)) - _ordered(computed.flatten().index_select(0, changed).view(bits))
    far = (ulps > MOST_ULP) | (ulps < -MOST_ULP)
    near = changed[~far]
    steps = torch.diff(near, prepend=near.new_zeros(1))
    fillers = (steps - 1).clamp(min=0) // LONGEST_GAP
    entries = (fillers + 1).cumsum(0) - 1
    count = int(entries[-1]) + 1 if len(entries) else 0
    gaps = torch.full((count,), LONGEST_GAP, dtype=torch.uint8, device=weight.device)
    kept = torch.zeros(count, dtype=torch.int8, device=weight.device)
    gaps[entries] = (steps - fillers * LONGEST_GAP).to(torch.uint8)
    kept[entries] = ulps[~far].to(torch.int8)
    return Corrections(gaps, kept, changed[far].to(torch.int32), values[far])


def correct_(computed: torch.Tensor, corrections: Corrections) -> None:
    """Give a contiguous tensor the bits that find_corrections was given. In place."""
    flat = computed.view(-1)
    bits = flat.view(BITS[flat.element_size()])
    positions = corrections.gaps.cumsum(0, dtype=torch.int64)
    near = _ordered(bits.index_select(0, positions)) + corrections.ulps.to(bits.dtype)
    bits.index_copy_(0, positions, _ordered(near))
    flat.index_copy_(0, corrections.positions.long(), corrections.values)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Return signed integers whose order is that of the floats; of these again, the bits."""
    sign = bits.element_size() * 8 - 1
    return bits ^ ((bits >> sign) & torch.iinfo(bits.dtype).max)
