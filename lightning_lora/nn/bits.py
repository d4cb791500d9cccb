"""The bits of weights, read as integers: whether a weight was written to, and how to give computed values its bits.

Merging adds s * B @ A to a weight, and unmerging must give back every bit. Sums of the bits show whether anything else
wrote to the weight meanwhile. Corrections repair what arithmetic alone does not bring back.

Corrections take two bytes an element. A weight that was scaled, divided and subtracted back is off in a few per cent of
its elements, and most of these are off by one unit in the last place (ulp). A position and a value would take 6 to 8
bytes. Here one byte holds the distance from the entry before, and one byte holds the number of ulp. Where more than 255
elements lie between two entries, entries that change nothing fill the gap. An element that is off by more than 127 ulp
keeps its position and its value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype by bytes of a float
LONGEST_GAP, MOST_ULP = 255, 127  # what one byte of Corrections can hold

Checksum = tuple[int, torch.dtype]  # sum of a weight's bits, and the integer dtype in which they were read


# --- was the weight written to? ---


def checksum(weight: torch.Tensor, integers: torch.dtype | None = None) -> Checksum:
    """Return the sum of a weight's bits and the integer dtype in which the bits were read.

    The sum does not depend on the order of the elements.

    Args:
        weight: any shape, floating point, plain.
        integers: the dtype of an earlier checksum, to compare with it. By default 64-bit words where the memory of the
            weight allows them, because these are many times faster, and else integers of the element's size.
    """
    total, integers = bit_sum(weight, integers)
    return int(total.item()), integers


def bit_sum(weight: torch.Tensor, integers: torch.dtype | None = None) -> tuple[torch.Tensor, torch.dtype]:
    """Return what checksum returns, with the sum as an int64 scalar on the weight's device."""
    if not weight.numel():  # a rank's shard may be empty; torch cannot view an empty tensor as words
        return weight.new_zeros((), dtype=torch.int64), integers or torch.int64
    fits_words = weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0
    integers = integers or (torch.int64 if fits_words else BITS[weight.element_size()])
    if integers.itemsize != weight.element_size():
        if not fits_words:  # the weight moved to other memory after the earlier checksum
            weight = weight.clone(memory_format=torch.contiguous_format)
        if weight.shape[-1] * weight.element_size() % 8:
            weight = weight.view(-1)
    return weight.view(integers).sum(), integers


# --- give computed values the bits of the weight ---


class Corrections(NamedTuple):
    """The elements in which a computed tensor differs from the wanted one, and how to correct them."""

    gaps: torch.Tensor  # uint8 (n,): number of elements since the entry before
    ulps: torch.Tensor  # int8 (n,): added to the bits, read as ordered integers
    positions: torch.Tensor  # int32 (m,): elements that are off by more than MOST_ULP
    values: torch.Tensor  # (m,): the wanted values at `positions`


def differing(weight: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """Return a flat mask of the elements whose bits differ in two tensors of one shape and dtype."""
    bits = BITS[weight.element_size()]
    return (weight.view(bits) != computed.view(bits)).flatten()


def far_off(weight: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """Return a mask of the elements that are off by more than MOST_ULP, in two tensors of one shape and dtype."""
    bits = BITS[weight.element_size()]
    return _is_far(_ordered(weight.view(bits)) - _ordered(computed.view(bits)))


def places(mask: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Return the positions, int64 and ascending, at which a flat mask is true.

    Args:
        mask: (n,), bool, with fewer than 2**31 elements.
        count: number of these positions, if it is known. The host then does not wait for the mask's device.
    """
    if count is None:
        return mask.nonzero().squeeze(1)
    numbers = torch.arange(1, count + 1, dtype=torch.int32, device=mask.device)
    return torch.searchsorted(mask.cumsum(0, dtype=torch.int32), numbers)


def find_corrections(
    weight: torch.Tensor, computed: torch.Tensor, changed: torch.Tensor, far_count: int | None = None
) -> Corrections:
    """Return the corrections that turn `computed` into `weight`.

    Args:
        weight: any shape, floating point.
        computed: the same shape and dtype.
        changed: int64, ascending: positions in the flattened tensors at which the bits differ.
        far_count: number of elements that are off by more than MOST_ULP, if it is known. The host then does not wait
            for the weight's device, and there are up to one entry in LONGEST_GAP elements more than needed.
    """
    bits = BITS[weight.element_size()]
    values = weight.flatten().index_select(0, changed)
    ulps = _ordered(values.view(bits)) - _ordered(computed.flatten().index_select(0, changed).view(bits))
    is_far = _is_far(ulps)
    near_places = places(~is_far, None if far_count is None else len(changed) - far_count)
    far_places = places(is_far, far_count)
    near, near_ulps = changed.index_select(0, near_places), ulps.index_select(0, near_places).to(torch.int8)
    gaps, kept = _entries(near, near_ulps, None if far_count is None else weight.numel())
    far = changed.index_select(0, far_places).to(torch.int32)
    return Corrections(gaps, kept, far, values.index_select(0, far_places))


def _entries(near: torch.Tensor, ulps: torch.Tensor, elements: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gaps and ulps of Corrections for elements at ascending positions `near`, with entries that fill long gaps.

    Args:
        near: positions, int64.
        ulps: int8, one for each position.
        elements: number of elements of the weight, if the host must not wait. It limits the number of fillers, and
            unused entries at the end repeat the last one, which changes nothing.
    """
    steps = torch.diff(near, prepend=near.new_zeros(1))
    fillers = (steps - 1).clamp(min=0) // LONGEST_GAP
    entries = (fillers + 1).cumsum(0) - 1
    if elements is None or not len(near):
        count = int(entries[-1]) + 1 if len(entries) else 0
        gaps = torch.full((count,), LONGEST_GAP, dtype=torch.uint8, device=near.device)
        kept = torch.zeros(count, dtype=torch.int8, device=near.device)
    else:
        unused = torch.arange(len(near) + elements // LONGEST_GAP, device=near.device) > entries[-1]
        gaps = unused.logical_not().to(torch.uint8) * LONGEST_GAP
        kept = unused.to(torch.int8) * ulps[-1]
    gaps[entries] = (steps - fillers * LONGEST_GAP).to(torch.uint8)
    kept[entries] = ulps
    return gaps, kept


def correct_(computed: torch.Tensor, corrections: Corrections) -> None:
    """Apply corrections to a contiguous tensor. In place."""
    flat = computed.view(-1)
    bits = flat.view(BITS[flat.element_size()])
    positions = corrections.gaps.cumsum(0, dtype=torch.int64)
    near = _ordered(bits.index_select(0, positions)) + corrections.ulps.to(bits.dtype)
    bits.index_copy_(0, positions, _ordered(near))
    flat.index_copy_(0, corrections.positions.long(), corrections.values)


def _is_far(ulps: torch.Tensor) -> torch.Tensor:
    return (ulps > MOST_ULP) | (ulps < -MOST_ULP)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of floats to signed integers in the same order. The mapping is its own inverse.

    Neighbouring floats then differ by 1, so a difference of integers is a number of ulp.
    """
    sign = bits.element_size() * 8 - 1
    return bits ^ ((bits >> sign) & torch.iinfo(bits.dtype).max)
