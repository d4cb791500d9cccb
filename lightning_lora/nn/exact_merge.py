"""The merge arithmetic on one weight: add s * B @ A in place, take it out again bit for bit.

Per chunk of rows, with D = s * B @ A in float64, and d its value in the dtype of the subtraction (float32 for bfloat16
and float32):

    merge:    new = round(W + D); back = round(new - d); store W where back's bits differ; W <- new
    unmerge:  W <- round(W - d); W[stored positions] <- the stored values

Where a block has a scale c, new = round(c * (W + D)) and back = round(new / c - D), in the arithmetic's dtype, and what
differs is stored as nn/ulp_corrections.py has it, because it is more.

Adding and subtracting alone drifts; a full copy doubles the memory. This stores the few per cent of values that
subtraction would not bring back, and its own copies of A and B, so that d is the same bits both times. Why float64: in
float32, B @ A is off by many ulp where W and D are both small, and autocast and the matmul precision settings would
change its bits; for thin factors it costs the same. Chunks and buffers stay in the cache, because fresh pages cost
more than the arithmetic. This file is the only place that adds a delta to a weight: live merge, merged save and the
command line all come here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..errors import LoRAError, NonFiniteError
from .low_rank import LowRankBlock, scale_blocks
from .ulp_corrections import BITS, Corrections, correct_, find_corrections

CPU_CHUNK, GPU_CHUNK = 2**17, 2**24  # elements: of a thread, small enough for its cache; enough to fill a card
MOST_THREADS = 2  # that a chunk on the CPU is measured for
COPY_ABOVE = 0.25  # share of a weight that changes, below which its values take less time than a copy of it all
STORE_AT_MOST = 0.25  # above this share of a chunk's values, a plain copy of the chunk is stored
EVERYTHING = slice(None)

Stored = Corrections | tuple[torch.Tensor, torch.Tensor] | torch.Tensor
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class WeightEditedError(LoRAError):
    """A weight was changed while it was merged, and was restored all the same."""


@dataclass
class RestoreRecord:
    """What unmerge_weight_ needs: the factors and, per chunk, values or a plain copy; or a copy of the whole weight."""

    factors: list[LowRankBlock]  # copies
    scaling: float = 1.0  # s
    copy: torch.Tensor | None = None  # of the whole weight
    # One entry a merged chunk, in order: positions and values, or ulp of a scaled one, or a copy of the chunk.
    chunks: list[Stored] = field(default_factory=list)
    checksum: int | None = None  # of the weight's bits: beside a copy of the whole, after the merge; else before it
    checksum_dtype: torch.dtype = torch.int64  # the integers that they were summed as
    threads: int = 0  # that computed d; another number can change its last bits

    def nbytes(self) -> int:
        """Return the bytes held, without the copies of the factors."""
        tensors = [] if self.copy is None else [self.copy]
        for chunk in self.chunks:
            tensors += chunk if isinstance(chunk, tuple) else [chunk]
        return sum(tensor.nbytes for tensor in tensors)


def merge_weight_(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    copy: bool = False,
    spare: torch.Tensor | None = None,
    observe: Observer | None = None,
) -> RestoreRecord:
    """Add scaling * (the blocks) to a weight and apply their scales, each element rounded once. In place.

    Args:
        weight: any shape, floating point.
        blocks: the factors, in any floating dtype.
        scaling: s.
        copy: store a plain copy of the weight instead of the values that subtraction would miss, if most of it changes.
        spare: memory for the copy, of an earlier one that is done with; used where it fits.
        observe: called for each chunk with W' rounded, W' and what it adds to W, all in float64.

    Returns:
        What unmerge_weight_ needs.

    Raises:
        NonFiniteError: a value of the sum is not finite. The weight is then as it was.
    """
    copy = copy and sum(len(each.left) * each.right.shape[1] for each in blocks) >= COPY_ABOVE * weight.numel()
    with exact_arithmetic(weight):
        record = _copy_record(weight, spare) if copy else _values_record(weight, blocks, scaling)
        try:
            _merge_chunks(weight, blocks, scaling, record, observe)
        except BaseException:
            _restore(weight, record)
            raise
        if copy:
            record.checksum = _checksum(weight, record.checksum_dtype)
    return record


def unmerge_weight_(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo merge_weight_ bit for bit, and use the record up. In place.

    Raises:
        WeightEditedError: something else wrote to the weight while it was merged; it has its old bits all the same.
        LoRAError: the same, and its old bits are lost.
    """
    with exact_arithmetic(weight, record.threads):
        copied = record.copy is not None
        edited = copied and _differs(weight, record)
        _restore(weight, record)
        if not copied and _differs(weight, record):
            raise LoRAError(
                "the restored weight is not bit for bit what it was before merging; it was changed while it was "
                "merged, or this machine computes differently. Load the base weights again before you go on"
            )
    if edited:
        raise WeightEditedError(
            "the weight was changed while it was merged; the change is undone, and it is what it was before merging. "
            "Change weights while the model is unmerged"
        )


def restored_weight(weight: torch.Tensor, record: RestoreRecord) -> torch.Tensor:
    """Return the weight as it was before merge_weight_, as a new tensor; `weight` and `record` are left alone."""
    with exact_arithmetic(weight):
        if record.copy is not None:
            return record.copy.clone()
        original = weight.detach().clone()
        unmerge_weight_(original, replace(record, chunks=list(record.chunks)))
    return original


def merged_weight(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
    observe: Observer | None = None,
) -> torch.Tensor:
    """Return W' as a new tensor: what merge_weight_ would write, or that sum rounded once to another dtype."""
    with exact_arithmetic(weight):
        merged = weight.detach().to(dtype or weight.dtype, copy=True)
        scratch = Scratch(weight)
        for chunk in _chunks(weight, blocks, scaling):
            target = _window(merged, chunk)
            new, exact = _rounded_sum(_window(weight, chunk), chunk, scratch, target)
            if observe:
                observe(new.to(exact.dtype), exact, _change(_window(weight, chunk), exact, chunk, scratch))
            if new is not target:
                target.copy_(new)
    return merged


@contextmanager
def exact_arithmetic(weight: torch.Tensor, threads: int | None = None) -> Iterator[None]:
    """Let a weight be written in place whatever surrounds the call, and compute in that many threads, if given.

    Inside no gradients are recorded, and inference mode is on just where the weight was made in it.
    """
    before = torch.get_num_threads()
    if threads and threads != before:
        torch.set_num_threads(threads)
    try:
        inference = weight.is_inference()
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() != inference:
            with torch.inference_mode(inference), torch.no_grad():
                yield
        else:
            yield
    finally:
        if threads and threads != before:
            torch.set_num_threads(before)


def _values_record(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> RestoreRecord:
    factors = [
        block._replace(
            left=block.left.detach().clone(),
            right=block.right.detach().clone(),
            scale=None if block.scale is None else block.scale.detach().clone(),
        )
        for block in blocks
    ]
    integers = _checksum_dtype(weight)
    checksum = _checksum(weight, integers)
    return RestoreRecord(factors, scaling, checksum=checksum, checksum_dtype=integers, threads=torch.get_num_threads())


def _copy_record(weight: torch.Tensor, spare: torch.Tensor | None) -> RestoreRecord:
    layout = (weight.dtype, weight.device, weight.shape, weight.stride(), weight.is_inference())
    if spare is not None and layout == (spare.dtype, spare.device, spare.shape, spare.stride(), spare.is_inference()):
        copy = spare.copy_(weight.detach())
    else:
        copy = weight.detach().clone()
    return RestoreRecord([], copy=copy, checksum_dtype=_checksum_dtype(weight))


def _checksum_dtype(weight: torch.Tensor) -> torch.dtype:
    """What to sum the weight's bits as: whole words where its memory allows it, which is many times faster."""
    return torch.int64 if _fits_words(weight) else BITS[weight.element_size()]


def _fits_words(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0


def _checksum(weight: torch.Tensor, integers: torch.dtype) -> int:
    """An order-independent check value of the weight's bits."""
    if integers != BITS[weight.element_size()]:
        if not _fits_words(weight):  # it is in other memory than before
            weight = weight.clone(memory_format=torch.contiguous_format)
        weight = weight.view(-1)
    return int(weight.view(integers).sum())


def _differs(weight: torch.Tensor, record: RestoreRecord) -> bool:
    return record.checksum is not None and _checksum(weight, record.checksum_dtype) != record.checksum


def _merge_chunks(
    weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float, record: RestoreRecord, observe: Observer | None
) -> None:
    """Merge one chunk after the other, in place, and add to the record what undoing each takes."""
    scratch = Scratch(weight)
    copied = record.copy is not None  # then there is nothing to compare
    for chunk in _chunks(weight, blocks, scaling):
        window = _window(weight, chunk)
        target = window if copied else scratch.take("new", window.shape, window.dtype)
        before = window.clone() if observe and chunk.scale is not None else window
        new, exact = _rounded_sum(window, chunk, scratch, target)
        if observe or not copied:
            delta = _delta(window, chunk, scratch)
        if observe:
            observe(new.to(exact.dtype), exact, delta if chunk.scale is None else exact - before.to(exact.dtype))
        if not copied:
            back = _taken_out(new, chunk, scratch, delta)
            record.chunks.append(_differing(window, back, scaled=chunk.scale is not None))
        if new is not window:
            window.copy_(new)


def _restore(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo the merged chunks, last first, and drop each from the record, so that another call goes on from there."""
    if record.copy is not None:
        weight.detach().copy_(record.copy)
        return
    chunks = _chunks(weight, record.factors, record.scaling)
    scratch = Scratch(weight)
    while record.chunks:
        chunk, stored = chunks[len(record.chunks) - 1], record.chunks[-1]
        window = _window(weight, chunk)
        if isinstance(stored, torch.Tensor):
            window.copy_(stored)
        else:
            back = _taken_out(window, chunk, scratch, _delta(window, chunk, scratch))
            if isinstance(stored, Corrections):
                correct_(back, stored)
            else:
                back.view(-1).index_copy_(0, stored[0].long(), stored[1])
            window.copy_(back)
        record.chunks.pop()


def chunk_elements(device: torch.device) -> int:
    """Return how many elements are merged at a time on a device, with torch's present number of threads."""
    return CPU_CHUNK * min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else GPU_CHUNK


def _chunks(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> list[LowRankBlock]:
    """Cut blocks into blocks of few rows, in the dtype of the arithmetic, with the scaling folded into left."""
    elements = chunk_elements(weight.device)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64  # mps has no float64
    chunks = []
    for block in scale_blocks(blocks, scaling, dtype):
        rows = max(1, elements // max(1, block.right.shape[1]))
        if block.left.shape[0] <= rows:
            chunks.append(block)
            continue
        starts = range(0, block.left.shape[0], rows)
        parts = (block.part(slice(start, start + rows), EVERYTHING) for start in starts)
        chunks += [part._replace(row=block.row + start) for start, part in zip(starts, parts, strict=True)]
    return chunks


def _window(weight: torch.Tensor, chunk: LowRankBlock) -> torch.Tensor:
    """A view of a chunk's rows and columns in a weight."""
    rows, columns = chunk.left.shape[0], chunk.right.shape[1]
    window = weight.detach()
    if rows < len(weight):
        window = window.narrow(0, chunk.row, rows)
    if columns * len(weight) != weight.numel():
        window = window.narrow(1, chunk.col, columns)
    return window


def _rounded_sum(
    window: torch.Tensor, chunk: LowRankBlock, scratch: Scratch, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """W' in the weight's dtype, in `target` where the arithmetic has another, and W' in the arithmetic's."""
    exact = scratch.take("exact", window.shape, chunk.left.dtype).copy_(window)
    if window.dtype == chunk.left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(_delta(window, chunk, scratch))
    else:
        _as_matrix(exact, chunk).addmm_(chunk.left, chunk.right)
    if chunk.scale is not None:
        _as_matrix(exact, chunk).mul_(chunk.scale)
    new = exact if exact.dtype == target.dtype else target.copy_(exact)
    # A sum is cheap, and finite where all values are, but for an overflow of its own.
    if not math.isfinite(new.sum().item()) and not torch.isfinite(new).all():
        raise NonFiniteError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    return new, exact


def _delta(window: torch.Tensor, chunk: LowRankBlock, scratch: Scratch) -> torch.Tensor:
    """D of a chunk, in the window's shape, in a buffer."""
    left, right = chunk.left, chunk.right
    product = scratch.take("delta", torch.Size((left.shape[0], right.shape[1])), left.dtype)
    return torch.mm(left, right, out=product).view(window.shape)


def _change(window: torch.Tensor, exact: torch.Tensor, chunk: LowRankBlock, scratch: Scratch) -> torch.Tensor:
    """W' - W of a chunk."""
    return _delta(window, chunk, scratch) if chunk.scale is None else exact - window.to(exact.dtype)


def _taken_out(merged: torch.Tensor, chunk: LowRankBlock, scratch: Scratch, delta: torch.Tensor) -> torch.Tensor:
    """What unmerging would leave without the stored values, in the weight's dtype, in a buffer; delta is used up."""
    if chunk.scale is not None:
        merged_wide = scratch.take("quotient", merged.shape, delta.dtype).copy_(merged)
        _as_matrix(merged_wide, chunk).div_(chunk.scale)
        return scratch.take("back", merged.shape, merged.dtype).copy_(torch.sub(merged_wide, delta, out=delta))
    delta = scratch.cast("difference", delta, scratch.difference)
    return scratch.cast("back", torch.sub(merged, delta, out=delta), merged.dtype)


def _as_matrix(values: torch.Tensor, chunk: LowRankBlock) -> torch.Tensor:
    return values.view(chunk.left.shape[0], chunk.right.shape[1])


def _differing(window: torch.Tensor, back: torch.Tensor, *, scaled: bool) -> Stored:
    """What of a window `back` has other bits of; a copy of the window where that is much."""
    bits = BITS[window.element_size()]
    changed = (window.view(bits) ^ back.view(bits)).flatten().nonzero().squeeze(1)
    if changed.numel() > STORE_AT_MOST * window.numel():
        return window.clone()
    if scaled:
        return find_corrections(window, back, changed)
    return changed.to(torch.int32), window.flatten().index_select(0, changed)


class Scratch:
    """Buffers that every chunk of a weight uses again.

    They have a chunk's elements in every large weight, so that each weight's buffers fit where the last one's were.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.device = weight.device
        self.elements = min(weight.numel(), chunk_elements(torch.device("cpu")))
        self.difference = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor, valid until the name is taken again."""
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < shape.numel():
            elements = max(self.elements, shape.numel())
            buffer = self.buffers[name, dtype] = torch.empty(elements, dtype=dtype, device=self.device)
        return buffer[: shape.numel()].view(shape)

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return values in another dtype, in a buffer; the same tensor where it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values.shape, dtype).copy_(values)
