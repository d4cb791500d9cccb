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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..errors import LoRAError
from .low_rank import LowRankBlock, scale_blocks

CPU_CHUNK, GPU_CHUNK = 2**18, 2**24  # elements; small enough for the caches, large enough to fill a card

KEEP_AT_MOST = 0.25  # above this share of a chunk, a plain copy of it serves
SPARE_BYTES = 64 * 2**20

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
        threads: the number of threads that computed d, which can change its last bits.
        written: where the merged weight lies and torch's count of the writes to it, after merging.
    """

    factors: list[LowRankBlock]
    scaling: float = 1.0
    copy: torch.Tensor | None = None
    chunks: list[tuple[torch.Tensor, torch.Tensor] | torch.Tensor] = field(default_factory=list)
    checksum: int = 0
    checksum_dtype: torch.dtype = torch.int64
    threads: int = 0
    written: tuple[int, int] | None = None

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
    observe: Observer | None = None,
) -> RestoreRecord:
    """Add scaling * (the blocks) to a weight, in place, each element rounded once.

    Args:
        weight: any shape, floating point.
        blocks: the factors, in any floating dtype.
        scaling: s.
        copy: keep a plain copy of the weight instead of the values that subtraction would miss.
        observe: called for each chunk with the rounded sum, the exact sum and the delta, all in float64.

    Returns:
        What unmerge_weight_ needs.

    Raises:
        LoRAError: a value of the sum is not finite. The weight is then as it was.
    """
    with exact_arithmetic(weight):
        record = RestoreRecord([], copy=SPARES.copy_of(weight)) if copy else _new_record(weight, blocks, scaling)
        try:
            scratch = Scratch(weight, CPU_CHUNK)
            for chunk, left, right in _chunks(weight, _scaled(blocks, scaling, weight.device)):
                _merge_chunk(chunk, left, right, scratch, record, observe)
        except BaseException:
            _restore(weight, record)
            raise
        record.written = _writes(weight)
    return record


def unmerge_weight_(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo merge_weight_, in place, bit for bit. The record is used up.

    Raises:
        WeightEditedError: something else wrote to the weight while it was merged; it has its old bits all the same.
        LoRAError: the same, and its old bits are lost.
    """
    written = _writes(weight)
    with exact_arithmetic(weight, record.threads):
        _restore(weight, record)
        if record.copy is not None:
            SPARES.take_back(record.copy)
            if written and record.written and written[0] == record.written[0] and written != record.written:
                raise WeightEditedError(
                    "the weight was changed while it was merged; the change is undone, and it is what it was before "
                    "merging. Change weights while the model is unmerged"
                )
        elif _checksum(weight, record.checksum_dtype) != record.checksum:
            raise LoRAError(
                "the restored weight is not bit for bit what it was before merging; it was changed while it was "
                "merged, or this machine computes differently. Load the base weights again before you go on"
            )


class WeightEditedError(LoRAError):
    """A weight was changed while it was merged, and was restored all the same."""


def _writes(weight: torch.Tensor) -> tuple[int, int] | None:
    """Where a weight lies, for copies of a model count anew, and torch's count of writes; none in inference mode."""
    return None if weight.is_inference() else (weight.data_ptr(), weight._version)


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
        for chunk, left, right in _chunks(merged, _scaled(blocks, scaling, weight.device)):
            new, _ = _rounded_sum(chunk, left, right, scratch, chunk)
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


def _new_record(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> RestoreRecord:
    own = [block._replace(left=block.left.detach().clone(), right=block.right.detach().clone()) for block in blocks]
    integers = _checksum_dtype(weight)
    checksum = _checksum(weight, integers)
    return RestoreRecord(own, scaling, checksum=checksum, checksum_dtype=integers, threads=torch.get_num_threads())


def _scaled(blocks: list[LowRankBlock], scaling: float, device: torch.device) -> list[LowRankBlock]:
    """The factors in the dtype of the arithmetic, the scaling folded into left."""
    return scale_blocks(blocks, scaling, torch.float32 if device.type == "mps" else torch.float64)  # mps has no float64


def _chunks(
    weight: torch.Tensor, blocks: list[LowRankBlock]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Views of the weight, chunk by chunk, each with its factors."""
    for block in blocks:
        for start in _starts(weight, block):
            yield _chunk(weight, block, start)


def _starts(weight: torch.Tensor, block: LowRankBlock) -> range:
    most = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    return range(0, block.left.shape[0], max(1, most // max(1, block.right.shape[1])))


def _chunk(weight: torch.Tensor, block: LowRankBlock, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, width = block.left[start : start + _starts(weight, block).step], block.right.shape[1]
    chunk = weight.detach()
    if len(left) < len(weight):
        chunk = chunk.narrow(0, block.row + start, len(left))
    if width * len(weight) != weight.numel():
        chunk = chunk.narrow(1, block.col, width)
    return chunk, left, block.right


def _merge_chunk(
    chunk: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scratch: Scratch,
    record: RestoreRecord,
    observe: Observer | None,
) -> None:
    copied = record.copy is not None  # then there is nothing to compare
    target = chunk if copied else scratch.take("new", chunk.shape, chunk.dtype)
    new, exact = _rounded_sum(chunk, left, right, scratch, target)
    if observe or not copied:
        delta = _delta(chunk, left, right, scratch)
    if observe:
        observe(new.to(delta.dtype), exact, delta)
    if not copied:
        record.chunks.append(_differing(chunk, _subtract(new, delta, scratch)))
    if new is not chunk:
        chunk.copy_(new)


def _rounded_sum(
    chunk: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scratch: Scratch, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """W' of a chunk in the weight's dtype, in `target` unless that is the arithmetic's too, and in the arithmetic's."""
    exact = scratch.take("exact", chunk.shape, left.dtype).copy_(chunk)
    if chunk.dtype == left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(_delta(chunk, left, right, scratch))
    else:
        exact.view(left.shape[0], right.shape[1]).addmm_(left, right)
    new = exact if exact.dtype == target.dtype else target.copy_(exact)
    # A sum is cheap, and finite where all values are, but for an overflow of its own.
    total = new.sum(dtype=torch.promote_types(new.dtype, torch.float32)).item()
    if not math.isfinite(total) and not torch.isfinite(new).all():
        raise LoRAError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    return new, exact


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
    merged = [(block, start) for block in blocks for start in _starts(weight, block)]
    scratch = Scratch(weight, CPU_CHUNK)
    while record.chunks:
        block, start = merged[len(record.chunks) - 1]
        kept = record.chunks[-1]
        chunk, left, right = _chunk(weight, block, start)
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


class Spares:
    """The memory of plain copies that are done with, for the next ones: at most 64 MB, on the CPU alone.

    Another device's own allocator does the same.
    """

    def __init__(self) -> None:
        self.free: dict[tuple[torch.dtype, torch.Size, bool], list[torch.Tensor]] = {}
        self.nbytes = 0
        self.lock = threading.Lock()

    def copy_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a copy of the weight, with its strides."""
        with self.lock:
            fits = weight.is_contiguous() and weight.device.type == "cpu"
            free = self.free.get(self._key(weight)) if fits else None
            spare = free.pop() if free else None
            self.nbytes -= 0 if spare is None else spare.nbytes
        if spare is None:
            return weight.detach().clone(memory_format=torch.preserve_format)
        return spare.copy_(weight.detach())

    def take_back(self, copy: torch.Tensor) -> None:
        """Keep the memory of a copy that nothing else uses from now on, where there is room."""
        wanted = copy.is_contiguous() and copy.device.type == "cpu"
        with self.lock:
            if wanted and self.nbytes + copy.nbytes <= SPARE_BYTES:
                self.nbytes += copy.nbytes
                self.free.setdefault(self._key(copy), []).append(copy)

    def clear(self) -> None:
        """Give all memory back."""
        with self.lock:
            self.free.clear()
            self.nbytes = 0

    def _key(self, tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bool]:
        return tensor.dtype, tensor.shape, tensor.is_inference()


SPARES = Spares()
