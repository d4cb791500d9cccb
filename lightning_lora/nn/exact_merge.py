"""The merge arithmetic on one weight: add s * B @ A in place, take it out again bit for bit.

Per chunk of rows, with D = s * B @ A in float64, and d its value in the dtype of the subtraction (float32 for bfloat16
and float32):

    merge:    new = round(W + D); back = round(new - d); keep W where back's bits differ; W <- new
    unmerge:  W <- round(W - d); W[kept] <- the kept values

Adding and subtracting alone drifts; a full copy doubles the memory. This keeps the few per cent of values that
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

from ..errors import LoRAError
from .low_rank import LowRankBlock, scale_blocks

CPU_CHUNK, GPU_CHUNK = 2**18, 2**24  # elements; small enough for the caches, large enough to fill a card

KEEP_AT_MOST = 0.25  # above this share of a chunk, a plain copy of it serves

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class RestoreRecord:
    """What taking a delta out again needs: the factors and, per chunk, values or a plain copy.

    Attributes:
        factors: own copies of the factors.
        scaling: s.
        copy: a plain copy of the whole weight, which makes the rest unnecessary.
        chunks: one entry a merged chunk, in order: positions and values, or a copy of the chunk.
        checksum, checksum_dtype: of the weight's bits before the merge, and the integers that they were summed as.
        threads: the number of threads that computed d and the sums, which can change their last bits.
        sums: beside a plain copy, the sum over each merged chunk, and the chunk's (row, rows, column, columns).
    """

    factors: list[LowRankBlock]
    scaling: float = 1.0
    copy: torch.Tensor | None = None
    chunks: list[tuple[torch.Tensor, torch.Tensor] | torch.Tensor] = field(default_factory=list)
    checksum: int = 0
    checksum_dtype: torch.dtype = torch.int64
    threads: int = 0
    sums: list[tuple[float, tuple[int, int, int, int]]] = field(default_factory=list)

    def nbytes(self) -> int:
        """Return the bytes held, without the copies of the factors."""
        tensors = [] if self.copy is None else [self.copy]
        for chunk in self.chunks:
            tensors += chunk if isinstance(chunk, tuple) else [chunk]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def merge_weight_(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    copy: bool = False,
    spare: torch.Tensor | None = None,
    observe: Observer | None = None,
) -> RestoreRecord:
    """Add scaling * (the blocks) to a weight, in place, each element rounded once.

    Args:
        weight: any shape, floating point.
        blocks: the factors, in any floating dtype.
        scaling: s.
        copy: keep a plain copy of the weight instead of the values that subtraction would miss.
        spare: memory for the copy, of an earlier one that is done with; used where it fits.
        observe: called for each chunk with the rounded sum, the exact sum and the delta, all in float64.

    Returns:
        What unmerge_weight_ needs.

    Raises:
        LoRAError: a value of the sum is not finite. The weight is then as it was.
    """
    with exact_arithmetic(weight):
        record = _copy_record(weight, spare) if copy else _values_record(weight, blocks, scaling)
        try:
            scratch = Scratch(weight, CPU_CHUNK)
            for block, start in _chunks(weight, _scaled(blocks, scaling, weight.device)):
                _merge_chunk(weight, block, start, scratch, record, observe)
        except BaseException:
            _restore(weight, record)
            raise
    return record


def unmerge_weight_(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo merge_weight_, in place, bit for bit. The record is used up.

    Raises:
        WeightEditedError: something else wrote to the weight while it was merged; it has its old bits all the same.
        LoRAError: the same, and its old bits are lost.
    """
    with exact_arithmetic(weight, record.threads):
        edited = any(_sum(_window(weight, *where)) != total for total, where in record.sums)
        _restore(weight, record)
        if record.copy is None and _checksum(weight, record.checksum_dtype) != record.checksum:
            raise LoRAError(
                "the restored weight is not bit for bit what it was before merging; it was changed while it was "
                "merged, or this machine computes differently. Load the base weights again before you go on"
            )
    if edited:
        raise WeightEditedError(
            "the weight was changed while it was merged; the change is undone, and it is what it was before merging. "
            "Change weights while the model is unmerged"
        )


class WeightEditedError(LoRAError):
    """A weight was changed while it was merged, and was restored all the same."""


def restored_weight(weight: torch.Tensor, record: RestoreRecord) -> torch.Tensor:
    """Return the weight as it was before merge_weight_, as a new tensor; `weight` and `record` are left alone."""
    with exact_arithmetic(weight):
        if record.copy is not None:
            return record.copy.clone(memory_format=torch.preserve_format)
        original = weight.detach().clone(memory_format=torch.preserve_format)
        unmerge_weight_(original, replace(record, chunks=list(record.chunks)))
    return original


def merged_weight(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> torch.Tensor:
    """Return W' as a new tensor: what merge_weight_ would write."""
    with exact_arithmetic(weight):
        merged = weight.detach().clone(memory_format=torch.preserve_format)
        scratch = Scratch(weight, CPU_CHUNK)
        for block, start in _chunks(merged, _scaled(blocks, scaling, weight.device)):
            chunk, left, right, _ = _chunk(merged, block, start)
            new, *_ = _rounded_sum(chunk, left, right, scratch, chunk)
            chunk.copy_(new)
    return merged


@contextmanager
def exact_arithmetic(weight: torch.Tensor, threads: int | None = None) -> Iterator[None]:
    """In-place writes whatever surrounds the call: no gradients, the given number of threads, and inference mode just
    where the weight was made in it.
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
    own = [block._replace(left=block.left.detach().clone(), right=block.right.detach().clone()) for block in blocks]
    integers = _checksum_dtype(weight)
    checksum = _checksum(weight, integers)
    return RestoreRecord(own, scaling, checksum=checksum, checksum_dtype=integers, threads=torch.get_num_threads())


def _copy_record(weight: torch.Tensor, spare: torch.Tensor | None) -> RestoreRecord:
    layout = (weight.dtype, weight.device, weight.shape, weight.stride(), weight.is_inference())
    if spare is not None and layout == (spare.dtype, spare.device, spare.shape, spare.stride(), spare.is_inference()):
        copy = spare.copy_(weight.detach())
    else:
        copy = weight.detach().clone(memory_format=torch.preserve_format)
    return RestoreRecord([], copy=copy, threads=torch.get_num_threads())


def _scaled(blocks: list[LowRankBlock], scaling: float, device: torch.device) -> list[LowRankBlock]:
    """The factors in the dtype of the arithmetic, the scaling folded into left."""
    return scale_blocks(blocks, scaling, torch.float32 if device.type == "mps" else torch.float64)  # mps has no float64


def _chunks(weight: torch.Tensor, blocks: list[LowRankBlock]) -> Iterator[tuple[LowRankBlock, int]]:
    """Each block with the first row, counted in the block, of each chunk of it."""
    return ((block, start) for block in blocks for start in _starts(weight, block))


def _starts(weight: torch.Tensor, block: LowRankBlock) -> range:
    most = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    return range(0, block.left.shape[0], max(1, most // max(1, block.right.shape[1])))


def _chunk(
    weight: torch.Tensor, block: LowRankBlock, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int, int]]:
    """A view of the weight, the factors of what is added to it, and where it is."""
    left = block.left[start : start + _starts(weight, block).step]
    where = (block.row + start, len(left), block.col, block.right.shape[1])
    return _window(weight, *where), left, block.right, where


def _window(weight: torch.Tensor, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
    """A view of some rows and columns of a weight seen as (rows, everything else)."""
    window = weight.detach()
    if rows < len(weight):
        window = window.narrow(0, row, rows)
    if columns * len(weight) != weight.numel():
        window = window.narrow(1, column, columns)
    return window


def _merge_chunk(
    weight: torch.Tensor,
    block: LowRankBlock,
    start: int,
    scratch: Scratch,
    record: RestoreRecord,
    observe: Observer | None,
) -> None:
    chunk, left, right, where = _chunk(weight, block, start)
    copied = record.copy is not None  # then there is nothing to compare
    target = chunk if copied else scratch.take("new", chunk.shape, chunk.dtype)
    new, exact, total = _rounded_sum(chunk, left, right, scratch, target)
    if observe or not copied:
        delta = _delta(chunk, left, right, scratch)
    if observe:
        observe(new.to(delta.dtype), exact, delta)
    if not copied:
        record.chunks.append(_differing(chunk, _subtract(new, delta, scratch)))
    if new is not chunk:
        chunk.copy_(new)
    if copied:
        record.sums.append((total if new is chunk else _sum(chunk), where))  # in the order in which it will be summed


def _rounded_sum(
    chunk: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scratch: Scratch, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """W' of a chunk in the weight's dtype, in `target` where the arithmetic has another; in the arithmetic's; sum."""
    exact = scratch.take("exact", chunk.shape, left.dtype).copy_(chunk)
    if chunk.dtype == left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(_delta(chunk, left, right, scratch))
    else:
        exact.view(left.shape[0], right.shape[1]).addmm_(left, right)
    new = exact if exact.dtype == target.dtype else target.copy_(exact)
    # A sum is cheap, and finite where all values are, but for an overflow of its own.
    total = _sum(new)
    if not math.isfinite(total) and not torch.isfinite(new).all():
        raise LoRAError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    return new, exact, total


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item())


def _delta(chunk: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """D of a chunk, in a buffer."""
    product = scratch.take("delta", torch.Size((left.shape[0], right.shape[1])), left.dtype)
    return torch.mm(left, right, out=product).view(chunk.shape)


def _subtract(merged: torch.Tensor, delta: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """What unmerging would leave without the kept values, in the weight's dtype, in a buffer; delta is used up."""
    delta = scratch.cast("difference", delta, scratch.difference)
    wide = torch.sub(merged, delta, out=delta)
    return scratch.cast("back", wide, merged.dtype)


def _differing(chunk: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    bits = BITS[chunk.element_size()]
    changed = (chunk.view(bits) ^ back.view(bits)).flatten().nonzero().squeeze(1)
    if changed.numel() > KEEP_AT_MOST * chunk.numel():
        return chunk.clone(memory_format=torch.preserve_format)
    return changed.to(torch.int32), chunk.flatten().index_select(0, changed)


def _restore(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo the merged chunks, last first; each is struck off when it is done, so that a failure can be taken up."""
    if record.copy is not None:
        weight.detach().copy_(record.copy)
        return
    blocks = _scaled(record.factors, record.scaling, weight.device)
    merged = list(_chunks(weight, blocks))
    scratch = Scratch(weight, CPU_CHUNK)
    while record.chunks:
        block, start = merged[len(record.chunks) - 1]
        kept = record.chunks[-1]
        chunk, left, right, _ = _chunk(weight, block, start)
        if isinstance(kept, torch.Tensor):
            chunk.copy_(kept)
        else:
            back = _subtract(chunk, _delta(chunk, left, right, scratch), scratch)
            back.view(-1).index_copy_(0, kept[0].long(), kept[1])
            chunk.copy_(back)
        record.chunks.pop()


def _checksum(weight: torch.Tensor, integers: torch.dtype) -> int:
    """An order-independent check value of the weight's bits."""
    weight = weight.detach()
    return int((weight.view(-1) if weight.is_contiguous() else weight).view(integers).sum(dtype=torch.int64))


def _checksum_dtype(weight: torch.Tensor) -> torch.dtype:
    """What to sum the weight's bits as: whole words where its memory allows it, which is many times faster."""
    whole = weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0
    return torch.int64 if whole else BITS[weight.element_size()]


class Scratch:
    """Buffers that every chunk of a weight uses again.

    They have `elements` in every large weight, so that each weight's buffers fit where the last one's were.
    """

    def __init__(self, weight: torch.Tensor, elements: int) -> None:
        self.device = weight.device
        self.elements = min(weight.numel(), elements)
        self.difference = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, like: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of that shape, valid until the name is taken again."""
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < like.numel():
            elements = max(self.elements, like.numel())
            buffer = self.buffers[name, dtype] = torch.empty(elements, dtype=dtype, device=self.device)
        return buffer[: like.numel()].view(like)

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """values in another dtype, in a buffer; the same tensor where it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values.shape, dtype).copy_(values)
