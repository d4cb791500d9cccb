"""The merge arithmetic on one weight: add s * B @ A in place, and restore every bit afterwards.

A weight is merged in chunks of rows. D = s * B @ A in float64, and d is D in the dtype of the subtraction (float32 for
bfloat16 and float32):

    merge:    new = round(W + D); back = round(new - d); store W where back's bits differ; W <- new
    unmerge:  W <- round(W - d); W[stored positions] <- the stored values

Where a block has a scale c, new = round(c * (W + D)) and back = round(new / c - D) in float64. More values differ then,
so they are stored as the Corrections of nn/bits.py.

Why values are stored: adding and subtracting alone drifts, and a full copy doubles the memory. Subtraction misses a few
per cent of the values, and only these are stored. A and B are copied too, so that d has the same bits both times.

Why float64: in float32, B @ A is off by many ulp where W and D are both small, and autocast and the matmul precision
settings would change its bits. For thin factors float64 costs the same.

Why chunks: a chunk and its buffers stay in the cache. Fresh pages of memory cost more than the arithmetic.

On a device that is not the CPU the arithmetic is that of nn/device_sum.py, and a merge has the two halves of
nn/device_merge.py.

No other file adds a delta to a weight. Live merging, merged saving and the command line all come here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from ..errors import LoRAError, NonFiniteError
from .autocast import in_full_float32
from .bits import BITS, Corrections, bit_sum, checksum, correct_, find_corrections
from .device_merge import (
    STORE_AT_MOST,
    Observer,
    Pending,
    Prepared,
    Stored,
    count_parts,
    finite_sums,
    refuse_unless_finite,
    stored_values,
    taken_out,
    tell_observer,
    there_and_back,
    write_parts_,
)
from .device_sum import DeviceSum
from .low_rank import LowRankBlock
from .merge_checks import Checks, Reading
from .scratch import Scratch

CPU_CHUNK, GPU_CHUNK = 2**17, 2**24  # elements: few enough for the cache of one CPU thread; enough to fill a GPU
MOST_THREADS = 2  # a chunk on the CPU grows with the number of threads up to this
COPY_ABOVE = 0.25  # a plain copy is faster than stored values if more than this share of the weight changes
EVERYTHING = slice(None)


class WeightEditedError(LoRAError):
    """Raised where something else changed a weight while it was merged. The weight was restored nevertheless."""


@dataclass
class RestoreRecord:
    """What unmerge_weight_ needs to restore a weight.

    A record holds either a copy of the whole weight, or the factors with one entry for each merged chunk.
    """

    factors: list[LowRankBlock]  # copies
    scaling: float = 1.0  # s
    copy: torch.Tensor | None = None  # of the whole weight
    # One entry for each merged chunk, in order: positions and values, Corrections of a scaled chunk, or a plain copy.
    chunks: list[Stored] = field(default_factory=list)
    # Sum of bits (see nn/bits.py) and the integer dtype in which they were read. With a copy: of the merged weight;
    # without one: of the weight before merging.
    checksum: tuple[int | Reading, torch.dtype] | None = None
    threads: int = 0  # number of threads that computed d; with another number its last bits can change
    # The index of a chunk and the values that merging or unmerging is about to write there. An exception may come
    # before or after the write; writing the same values again is right in both cases.
    merging: tuple[int, torch.Tensor] | None = None
    restoring: tuple[int, torch.Tensor] | None = None
    pending: Pending | None = None  # the second half of a merge on a device; None: all is done
    checksum_later: tuple[Reading, torch.dtype] | None = None  # the checksum from the second half on
    found: int | Reading | None = None  # the sum of bits to compare with the checksum; None: not computed yet
    restored: bool = False  # the weight has its old values again, and only the comparison is left

    def nbytes(self) -> int:
        """Return the bytes held, without the copies of the factors."""
        tensors = [] if self.copy is None else [self.copy]
        for chunk in self.chunks:
            tensors += chunk if isinstance(chunk, tuple) else [chunk]
        return sum(tensor.nbytes for tensor in tensors)

    def is_edited(self) -> bool:
        """Return whether something else changed the merged weight, after it was restored. May wait for a device."""
        if self.checksum is None:
            return False
        known, found = self.checksum[0], self.found
        numbers = [each.get() if isinstance(each, Reading) else each for each in (known, found)]
        return numbers[0] != numbers[1]

    def is_on_device(self) -> bool:
        """Return whether the weight is on a device other than the CPU."""
        held = self.copy if self.copy is not None else self.factors[0].left if self.factors else None
        return held is not None and not held.is_cpu


def parts_of(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, part) for parts of a weight that fit into the cache; a part is a matrix of some rows."""
    matrix = weight.flatten(1)
    size = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // max(1, matrix.shape[1]))
    for first in range(0, max(1, len(matrix)), size):
        yield first, matrix[first : first + size]


def merge_weight_(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    copy: bool = False,
    spare: torch.Tensor | None = None,
    observe: Observer | None = None,
    scratch: Scratch | None = None,
    hold: Callable[[RestoreRecord], object] | None = None,
    checks: Checks | None = None,
) -> RestoreRecord:
    """Add scaling * (the blocks) to a weight and apply their scales, each element rounded once. In place.

    Args:
        weight: any shape, floating point.
        blocks: the factors, in any floating dtype.
        scaling: s.
        copy: store a plain copy of the weight instead of single values, if more than COPY_ABOVE of the weight changes.
        spare: a tensor that is not needed any more; the copy reuses its memory if shape, dtype and device fit.
        observe: called for each chunk with W' rounded, W' and W' - W, all in the dtype of the arithmetic.
        scratch: buffers of an earlier merge, to be used again.
        hold: called with the record before the first write. Whatever exception follows, unmerge_weight_ can then undo
            what was written.
        checks: of a verb on many weights. On a device complete_merge_ then does the second half, after all have begun.

    Returns:
        What unmerge_weight_ needs.

    Raises:
        NonFiniteError: a value of the sum is not finite. The weight then has its old values.
    """
    copy = copy and sum(len(each.left) * each.right.shape[1] for each in blocks) >= COPY_ABOVE * weight.numel()
    with exact_arithmetic(weight):
        record = _copy_record(weight, spare) if copy else _values_record(weight, blocks, scaling)
        try:
            if hold:
                hold(record)
            if not weight.is_cpu:
                _begin_on_device(weight, blocks, scaling, record, checks or Checks(), observe)
            else:
                _merge_chunks(weight, blocks, scaling, record, observe, scratch or Scratch())
                record.checksum = record.checksum or checksum(weight)
            if checks is None and record.pending is not None:
                complete_merge_(weight, record)
        except BaseException:
            unmerge_weight_(weight, record)
            raise
    return record


def merge_prepared_(weight: torch.Tensor, prepared: Prepared, hold: Callable[[RestoreRecord], object]) -> None:
    """Do the first half of merge_weight_ with W' that was computed with other weights. In place."""
    record = RestoreRecord([], copy=prepared.copy)
    with exact_arithmetic(weight):
        try:
            hold(record)
            prepared.write_(weight)
            record.pending, record.checksum_later = prepared.pending, prepared.checksum
        except BaseException:
            unmerge_weight_(weight, record)
            raise


def complete_merge_(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Do what merge_weight_ left to do. In place.

    Raises:
        NonFiniteError: a value of the sum is not finite. unmerge_weight_ brings the old values back.
    """
    if record.pending is not None:
        with exact_arithmetic(weight):
            _complete(record, record.pending)
        record.checksum, record.pending = record.checksum_later or record.checksum, None


def unmerge_weight_(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo merge_weight_ bit for bit and use the record up. In place.

    A merge that an exception broke off is undone as far as it went. If an exception breaks this call off, another call
    continues.

    Raises:
        WeightEditedError: something else wrote to the merged weight, and the old bits were restored from a copy.
        LoRAError: something else wrote to the merged weight, and the old bits are lost.
    """
    restore_weight_(weight, record)
    if not record.is_edited():
        return
    if record.copy is None:
        raise LoRAError(
            "the restored weight is not bit for bit the weight before merging: it was changed while it was "
            "merged, or this machine computes differently. Load the base weights again before you go on"
        )
    raise WeightEditedError(
        "the weight was changed while it was merged; the change was undone, and the weight has its values from "
        "before merging. Change weights while the model is unmerged"
    )


def restore_weight_(weight: torch.Tensor, record: RestoreRecord, checks: Checks | None = None) -> None:
    """Write the old values back. In place; unmerge_weight_ then finds out whether the weight was edited.

    Args:
        weight: W'.
        record: the result of merge_weight_.
        checks: of a verb on many weights, which reads their sums at once. By default the sum is read now.
    """
    if record.restored:
        return
    with exact_arithmetic(weight, record.threads):
        if record.copy is not None and record.found is None:
            record.found = found_sum(weight, record, checks)
        _restore(weight, record)
        if record.copy is None:
            record.found = found_sum(weight, record, checks)
    record.restored = True


def found_sum(weight: torch.Tensor, record: RestoreRecord, checks: Checks | None) -> int | Reading | None:
    """Return the sum of a weight's bits, to be compared with the record's checksum; None if that has none."""
    if record.checksum is None:
        return None
    if checks is None:
        return checksum(weight, record.checksum[1])[0]
    return checks.ask(bit_sum(weight, record.checksum[1])[0])[0]


def restored_weight(weight: torch.Tensor, record: RestoreRecord) -> torch.Tensor:
    """Return a new tensor with the values before merge_weight_. `weight` and `record` stay unchanged."""
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
    """Return W' as a new tensor.

    Args:
        weight: W.
        blocks: the factors.
        scaling: s.
        dtype: of the result; W' is rounded to it once. By default W's dtype, and the values of merge_weight_.
        observe: as in merge_weight_.

    Raises:
        NonFiniteError: a value of the sum is not finite.
    """
    with exact_arithmetic(weight):
        merged = weight.detach().to(dtype or weight.dtype, copy=True)
        if weight.device.type != "cpu":
            _merge_copy_(merged, weight, blocks, scaling, observe)
            return merged
        scratch = Scratch()
        for part in _chunks(weight, blocks):
            chunk, target = _in_arithmetic(part, scaling, scratch), _window(merged, part)
            new, exact = _rounded_sum(_window(weight, chunk), chunk, scratch, target)
            if observe:
                observe(new.to(exact.dtype), exact, _change(_window(weight, chunk), exact, chunk, scratch))
            if new is not target:
                target.copy_(new)
    return merged


def exact_arithmetic(weight: torch.Tensor, threads: int = 0) -> AbstractContextManager[None]:
    """Allow writing to a weight in place, whatever modes of torch surround the call.

    Inside, no gradients are recorded. Inference mode is on if and only if the weight is an inference tensor. On a
    device products have the full precision of float32.

    Args:
        weight: the weight to be written.
        threads: number of threads to compute with; 0 keeps the present number.
    """
    inference, before = weight.is_inference(), torch.get_num_threads()
    threads = threads or before
    if not weight.is_cpu:
        return _device_arithmetic(inference, weight.device.type)
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() != inference or threads != before:
        return _changed_arithmetic(inference, threads, before)
    return nullcontext()  # merge() has entered the modes already; entering takes as long as a small operation


@contextmanager
def _changed_arithmetic(inference: bool, threads: int, before: int) -> Iterator[None]:
    if threads != before:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode(inference), torch.no_grad():
            yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


@contextmanager
def _device_arithmetic(inference: bool, device: str) -> Iterator[None]:
    with torch.inference_mode(inference), torch.no_grad(), in_full_float32(device):
        yield


def _values_record(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> RestoreRecord:
    factors = [
        block._replace(
            left=block.left.detach().clone(),
            right=block.right.detach().clone(),
            scale=None if block.scale is None else block.scale.detach().clone(),
        )
        for block in blocks
    ]
    known = checksum(weight) if weight.device.type == "cpu" else None  # a device is asked later
    return RestoreRecord(factors, scaling, checksum=known, threads=torch.get_num_threads())


def _copy_record(weight: torch.Tensor, spare: torch.Tensor | None) -> RestoreRecord:
    if spare is None or not _is_like(spare, weight):
        return RestoreRecord([], copy=weight.detach().clone())
    return RestoreRecord([], copy=spare.copy_(weight))


def _is_like(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        tensor.shape == weight.shape
        and tensor.dtype == weight.dtype
        and tensor.device == weight.device
        and tensor.stride() == weight.stride()
        and tensor.is_inference() == weight.is_inference()
    )


def _begin_on_device(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    record: RestoreRecord,
    checks: Checks,
    observe: Observer | None,
) -> None:
    """Begin a merge that complete_merge_ completes. In place."""
    if record.copy is None:
        total, integers = bit_sum(weight)
        record.checksum = checks.ask(total)[0], integers
        record.pending = count_parts(_parts(weight, record.factors), scaling, checks, observe)
        return
    record.pending = write_parts_(_parts(weight, blocks), scaling, checks, observe)
    total, integers = bit_sum(weight)
    record.checksum = checks.ask(total)[0], integers


def _complete(record: RestoreRecord, pending: Pending) -> None:
    """Do the second half of a merge on a device. In place."""
    if record.copy is not None:
        for (window, _), finite in zip(pending.parts, pending.finite, strict=True):
            refuse_unless_finite(window, finite)
        return
    for (window, block), finite, counts in zip(pending.parts, pending.finite, pending.counts, strict=True):
        summed = DeviceSum([block], record.scaling, window.dtype)
        if pending.observe:
            tell_observer(pending.observe, summed, window.unsqueeze(0))
        new, back = there_and_back(window, summed)
        refuse_unless_finite(new, finite)
        stored = stored_values(window, back, counts)
        record.merging = len(record.chunks), new
        record.chunks.append(stored)
        window.copy_(new)
        record.merging = None


def _parts(weight: torch.Tensor, blocks: list[LowRankBlock]) -> list[tuple[torch.Tensor, LowRankBlock]]:
    return [(_window(weight, part), part) for part in _chunks(weight, blocks)]


def _merge_copy_(
    merged: torch.Tensor, weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float, observe: Observer | None
) -> None:
    """Write W' into a tensor that holds W in the dtype of the result, on a device. In place."""
    dtype, checks = torch.promote_types(weight.dtype, merged.dtype), Checks()
    finite: list[tuple[torch.Tensor, Reading]] = []
    for window, part in _parts(weight, blocks):
        summed, target = DeviceSum([part], scaling, dtype), _window(merged, part)
        summed.rounded(window.unsqueeze(0), target.unsqueeze(0))
        finite.append((target, checks.ask(finite_sums(target.unsqueeze(0)))[0]))
        if observe:
            tell_observer(observe, summed, window.unsqueeze(0), target.dtype)
    for target, total in finite:
        refuse_unless_finite(target, total)


def _merge_chunks(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    record: RestoreRecord,
    observe: Observer | None,
    scratch: Scratch,
) -> None:
    """Merge one chunk after the other and append to the record what undoing it needs. In place."""
    copied = record.copy is not None  # nothing else needs to be stored
    for part in _chunks(weight, blocks):
        chunk, window = _in_arithmetic(part, scaling, scratch), _window(weight, part)
        target = window if copied else scratch.take("new", window, window.dtype)
        before = window.clone() if observe and chunk.scale is not None else window
        new, exact = _rounded_sum(window, chunk, scratch, target)
        if observe or not copied:
            delta = _delta(window, chunk, scratch)
        if observe:
            observe(new.to(exact.dtype), exact, delta if chunk.scale is None else exact - before.to(exact.dtype))
        if not copied:
            back = _taken_out(new, chunk, scratch, delta)
            stored = _differing(window, back, scaled=chunk.scale is not None)
            record.merging = len(record.chunks), new
            record.chunks.append(stored)
        if new is not window:
            window.copy_(new)
        record.merging = None  # the next chunk reuses the buffer that it refers to


def _restore(weight: torch.Tensor, record: RestoreRecord) -> None:
    """Undo the merged chunks, last first. Each is dropped from the record, so that another call can continue."""
    if record.copy is not None:
        weight.copy_(record.copy)
        return
    parts = _chunks(weight, record.factors)
    scratch = Scratch()
    last = len(record.chunks) - 1
    if record.merging is not None and record.merging[0] == last:
        _window(weight, parts[last]).copy_(record.merging[1])
        record.merging = None
    if record.restoring is not None and record.restoring[0] == last:
        _window(weight, parts[last]).copy_(record.restoring[1])
        record.chunks.pop()
    while record.chunks:
        part, stored = parts[len(record.chunks) - 1], record.chunks[-1]
        window = _window(weight, part)
        if isinstance(stored, torch.Tensor):
            window.copy_(stored)
        else:
            back = _values_back(window, part, record.scaling, scratch)
            if isinstance(stored, Corrections):
                correct_(back, stored)
            else:
                back.view(-1).index_copy_(0, stored[0].long(), stored[1])
            record.restoring = len(record.chunks) - 1, back
            window.copy_(back)
        record.chunks.pop()


def chunk_elements(device: torch.device) -> int:
    """Return the number of elements of one chunk on a device, for torch's present number of threads."""
    return CPU_CHUNK * min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else GPU_CHUNK


def _chunks(weight: torch.Tensor, blocks: list[LowRankBlock]) -> list[LowRankBlock]:
    """Split blocks into blocks of at most chunk_elements."""
    elements, chunks = chunk_elements(weight.device), []
    for block in blocks:
        rows = max(1, elements // max(1, block.right.shape[1]))
        if block.left.shape[0] <= rows:
            chunks.append(block)
            continue
        starts = range(0, block.left.shape[0], rows)
        parts = (block.part(slice(start, start + rows), EVERYTHING) for start in starts)
        step = block.stride or 1
        chunks += [part._replace(row=block.row + step * start) for start, part in zip(starts, parts, strict=True)]
    return chunks


def _in_arithmetic(chunk: LowRankBlock, scaling: float, scratch: Scratch) -> LowRankBlock:
    """Return a chunk in the dtype of the arithmetic, contiguous, with the scaling folded into left.

    left and right are buffers. The function uses few operations: for a small weight, each of them takes as long as a
    pass over the values.
    """
    dtype = torch.float64
    left = scratch.take("left", chunk.left, dtype).copy_(chunk.left).mul_(scaling)
    right = scratch.take("right", chunk.right, dtype).copy_(chunk.right)
    scale = None if chunk.scale is None else chunk.scale.to(dtype)
    return LowRankBlock(chunk.row, chunk.col, left, right, scale, chunk.replaces, chunk.stride)


def _window(weight: torch.Tensor, chunk: LowRankBlock) -> torch.Tensor:
    """Return a view of a chunk's rows and columns in a weight, or the weight itself if the chunk covers it."""
    if chunk.stride:
        size = chunk.left.shape[0], chunk.right.shape[1]
        return weight.as_strided(size, (chunk.stride, 1), weight.storage_offset() + chunk.row)
    (rows, columns), height = (chunk.left.shape[0], chunk.right.shape[1]), weight.shape[0]
    window = weight if rows == height else weight.narrow(0, chunk.row, rows)
    return window if columns * height == weight.numel() else window.narrow(1, chunk.col, columns)


def _rounded_sum(
    window: torch.Tensor, chunk: LowRankBlock, scratch: Scratch, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W' rounded to the dtype of `target`, and W' in the dtype of the arithmetic.

    `target` holds the first if the two dtypes differ.
    """
    exact = scratch.take("exact", window, chunk.left.dtype).copy_(window)
    if chunk.replaces:
        exact.masked_fill_(~exact.isfinite(), 0.0)
    if window.dtype == chunk.left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(_delta(window, chunk, scratch))
    else:
        _as_matrix(exact, chunk).addmm_(chunk.left, chunk.right)
    if chunk.scale is not None:
        _as_matrix(exact, chunk).mul_(chunk.scale)
    new = exact if exact.dtype == target.dtype else target.copy_(exact)
    # The sum is cheap. A sum that is not finite may be an overflow of the sum itself, so then all values are looked at.
    if not math.isfinite(new.sum().item()) and not torch.isfinite(new).all():
        raise NonFiniteError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    return new, exact


def _delta(window: torch.Tensor, chunk: LowRankBlock, scratch: Scratch) -> torch.Tensor:
    """Return D of a chunk in the window's shape, in a buffer."""
    delta = scratch.take("delta", window, chunk.left.dtype)
    torch.mm(chunk.left, chunk.right, out=_as_matrix(delta, chunk))
    return delta


def _change(window: torch.Tensor, exact: torch.Tensor, chunk: LowRankBlock, scratch: Scratch) -> torch.Tensor:
    """Return W' - W of a chunk."""
    return _delta(window, chunk, scratch) if chunk.scale is None else exact - window.to(exact.dtype)


def _taken_out(merged: torch.Tensor, chunk: LowRankBlock, scratch: Scratch, delta: torch.Tensor) -> torch.Tensor:
    """Return what unmerging computes before it corrects values, in the weight's dtype, in a buffer.

    `delta` is overwritten.
    """
    if chunk.scale is not None:
        merged_wide = scratch.take("quotient", merged, delta.dtype).copy_(merged)
        _as_matrix(merged_wide, chunk).div_(chunk.scale)
        return scratch.take("back", merged, merged.dtype).copy_(torch.sub(merged_wide, delta, out=delta))
    narrow = merged.dtype in (torch.float32, torch.bfloat16)
    delta = scratch.cast("difference", delta, torch.float32 if narrow else torch.float64)
    return scratch.cast("back", torch.sub(merged, delta, out=delta), merged.dtype)


def _values_back(window: torch.Tensor, part: LowRankBlock, scaling: float, scratch: Scratch) -> torch.Tensor:
    """Return what unmerging a part computes before it corrects values, contiguous."""
    if window.device.type != "cpu":
        return taken_out(window, part, scaling)
    chunk = _in_arithmetic(part, scaling, scratch)
    return _taken_out(window, chunk, scratch, _delta(window, chunk, scratch))


def _as_matrix(values: torch.Tensor, chunk: LowRankBlock) -> torch.Tensor:
    return values if values.dim() == 2 else values.view(chunk.left.shape[0], chunk.right.shape[1])


def _differing(window: torch.Tensor, back: torch.Tensor, *, scaled: bool) -> Stored:
    """Return what corrects `back` to the bits of the window; a copy of the window if many elements differ."""
    bits = BITS[window.element_size()]
    changed = (window.view(bits) ^ back.view(bits)).flatten().nonzero().squeeze(1)
    if changed.numel() > STORE_AT_MOST * window.numel():
        return window.clone()
    if scaled:
        return find_corrections(window, back, changed)
    return changed.to(torch.int32), window.flatten().index_select(0, changed)
