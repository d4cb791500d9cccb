"""The merge arithmetic on one weight: add s * B @ A in place, and restore every bit afterwards.

A weight is merged in chunks of rows, on every device in the same way. D = s * B @ A in float64:

    merge:    W' = round(c * (W + D)); back = round(W' / c - D); keep W where back's bits differ; W <- W'
    unmerge:  W <- round(W' / c - D); W[kept positions] <- the kept values

Why values are kept: adding and subtracting alone drifts, and a full copy doubles the memory. Subtraction misses a few
per cent of the values, and only these are kept. Of a small model plain copies are kept, which is faster. Trained rows
have no D: their values are W', and W's rows are kept.

Why float64: in float32, B @ A is off by many ulp where W and D are both small, and autocast and settings of precision
would change its bits; they leave float64 alone. A merge needs 2 r operations a weight, as a forward of r tokens does.

Why chunks: a chunk and its buffers stay in the cache. Fresh pages of memory cost more than the arithmetic.

The sum of a weight's bits shows whether it was changed while it was merged. Without copies it also checks the restore.

No other file adds a delta to a weight. Live merging, merged saving and the command line all come here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..errors import LoRAError, NonFiniteError
from .autocast import without_autocast
from .low_rank import EVERYTHING, LowRankBlock

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype by bytes of a float
CPU_CHUNK, GPU_CHUNK = 2**17, 2**22  # elements: few enough for the cache of one CPU thread; enough to fill a GPU
MOST_THREADS = 2  # a chunk on the CPU grows with the number of threads up to this
KEEP_AT_MOST = 0.25  # if more than this share of a chunk's values differs, a plain copy of the chunk is kept

Kept = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # a plain copy, or positions and values


class Chunk(NamedTuple):
    """What restores one chunk of a weight."""

    part: LowRankBlock
    kept: Kept
    new: torch.Tensor | None = None  # W', while it is being written: the weight may hold W, W' or a part of each


@dataclass
class Undo:
    """What unmerge_weight_ needs to restore a weight, whatever part of it was written when an exception came."""

    copied: bool = False  # plain copies alone: the checksum is that of W', else that of W
    scaling: float = 1.0  # s
    threads: int = 0  # number of threads that computed D; with another number its last bits can change
    checksum: int | None = None  # None: the merge has not come to its end
    chunks: list[Chunk] = field(default_factory=list)  # in order; each is noted before it is written

    def is_edited(self, weight: torch.Tensor) -> bool:
        """Return whether the bits of a weight do not have the sum that was noted, and forget the sum: a call that goes
        on where another was broken off must not take a half-restored weight for an edit.
        """
        wanted, self.checksum = self.checksum, None
        return wanted is not None and wanted != checksum(weight)

    def nbytes(self) -> int:
        """Return the bytes kept, without the copies of the factors."""
        kept = [each.kept if isinstance(each.kept, tuple) else (each.kept,) for each in self.chunks]
        return sum(tensor.nbytes for tensors in kept for tensor in tensors)


def merge_weight_(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    copies: Buffers | None = None,
    cost: list[float] | None = None,
    undo: Undo | None = None,
    buffers: Buffers | None = None,
) -> Undo:
    """Add scaling * (the blocks) to a weight and apply their scales, each element rounded once. In place.

    Args:
        weight: any shape, floating point.
        blocks: the factors, or the values of trained rows, in any floating dtype.
        scaling: s.
        copies: keep plain copies of what is written over, in this memory. It is in use until the weight is unmerged.
        cost: two sums, to which the squared norms of what rounding W' changes and of W' - W are added.
        undo: an empty one to fill, for a caller that undoes a merge which an exception broke off twice.
        buffers: those of the other weights that are merged now.

    Returns:
        What unmerge_weight_ needs.

    Raises:
        NonFiniteError: a value of the sum is not finite. The weight then has its old values.
    """
    undo, buffers = undo or Undo(), Buffers() if buffers is None else buffers
    undo.copied, undo.scaling, undo.threads = copies is not None, scaling, torch.get_num_threads()
    with exact_arithmetic(weight):
        try:
            if copies is None:
                known = checksum(weight)
                for part in _chunks(weight, [_copied(block) for block in blocks]):
                    _merge_chunk_(weight, part, undo, buffers, cost)
                undo.checksum = known
            else:
                for number, block in enumerate(blocks):
                    window = _window(weight, block)
                    undo.chunks.append(Chunk(block, copies.take(number, window, window.dtype).copy_(window)))
                for part in _chunks(weight, blocks):
                    window = _window(weight, part)
                    _write_sum_(window, window, part, _factors(part, scaling), buffers, cost)
                undo.checksum = checksum(weight)
        except BaseException:
            unmerge_weight_(weight, undo)
            raise
    return undo


def unmerge_weight_(weight: torch.Tensor, undo: Undo, buffers: Buffers | None = None) -> None:
    """Undo merge_weight_ bit for bit, as far as it went, and use `undo` up. In place.

    If an exception breaks this call off, another call continues.

    Raises:
        LoRAError: something else wrote to the merged weight. Where copies of all of W were kept, it is restored
            nevertheless.
    """
    with exact_arithmetic(weight, undo.threads):
        edited, buffers = undo.copied and undo.is_edited(weight), Buffers() if buffers is None else buffers
        undone = edited and sum(_window(weight, part).numel() for part, _, _ in undo.chunks) == weight.numel()
        while undo.chunks:
            part, kept, new = undo.chunks[-1]
            window = _window(weight, part)
            if isinstance(kept, tuple):
                if new is not None:
                    window.copy_(new)
                positions, values = kept
                kept = _taken_out(window, part, _factors(part, undo.scaling), buffers)
                kept.view(-1).index_copy_(0, positions.long(), values)
                undo.chunks[-1] = Chunk(part, kept)  # a plain copy, which is right before and after the write
            window.copy_(kept)
            undo.chunks.pop()
        if edited or undo.is_edited(weight):
            raise LoRAError(
                "the weight was changed while it was merged; the change was undone. Change weights while the model is "
                "unmerged"
                if undone
                else "the restored weight is not bit for bit the weight before merging: it was changed while it was "
                "merged, or this machine computes differently. Load the base weights again before you go on"
            )


def restored_weight(weight: torch.Tensor, undo: Undo) -> torch.Tensor:
    """Return a new tensor with the values before merge_weight_. `weight` and `undo` stay unchanged."""
    with exact_arithmetic(weight):
        original = weight.detach().clone()
        known = None if undo.copied else undo.checksum  # copies are W, whatever became of W'
        unmerge_weight_(original, replace(undo, chunks=list(undo.chunks), checksum=known))
    return original


def merged_weight(
    weight: torch.Tensor,
    blocks: list[LowRankBlock],
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
    cost: list[float] | None = None,
) -> torch.Tensor:
    """Return W' as a new tensor.

    Args:
        weight: W.
        blocks: the factors.
        scaling: s.
        dtype: of the result; W' is rounded to it once. By default W's dtype, and the values of merge_weight_.
        cost: as in merge_weight_.

    Raises:
        NonFiniteError: a value of the sum is not finite.
    """
    with exact_arithmetic(weight):
        merged, buffers = weight.detach().to(dtype or weight.dtype, copy=True), Buffers()
        for part in _chunks(weight, blocks):
            _write_sum_(_window(merged, part), _window(weight, part), part, _factors(part, scaling), buffers, cost)
    return merged


def exact_arithmetic(weight: torch.Tensor, threads: int = 0) -> AbstractContextManager[None]:
    """Allow writing to a weight in place, whatever modes of torch surround the call.

    Inside, no gradients are recorded. Inference mode is on if and only if the weight is an inference tensor.

    Args:
        weight: the weight to be written.
        threads: number of threads to compute with; 0 keeps the present number.
    """
    inference, before, device = weight.is_inference(), torch.get_num_threads(), weight.device.type
    changes_modes = torch.is_grad_enabled() or torch.is_inference_mode_enabled() != inference
    if changes_modes or threads not in (0, before) or torch.is_autocast_enabled(device):
        return _changed_arithmetic(inference, device, threads or before, before)
    return nullcontext()  # merge() has entered the modes already; entering takes as long as a small operation


@contextmanager
def _changed_arithmetic(inference: bool, device: str, threads: int, before: int) -> Iterator[None]:
    if threads != before:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode(inference), torch.no_grad(), without_autocast(device):
            yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def checksum(weight: torch.Tensor) -> int:
    """Return the sum of a weight's bits, wherever its memory lies. 64-bit words are many times faster than others."""
    flat = weight.reshape(-1)
    words = 8 // flat.element_size()
    if flat.numel() % words:
        return int(flat.view(BITS[flat.element_size()]).sum())
    aligned = flat.clone() if flat.storage_offset() % words else flat
    return int(aligned.view(torch.int64).sum()) if flat.numel() else 0


def parts_of(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, part) for parts of a weight that fit into the cache; a part is a matrix of some rows."""
    matrix = weight.flatten(1)
    size = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // max(1, matrix.shape[1]))
    for first in range(0, max(1, len(matrix)), size):
        yield first, matrix[first : first + size]


def chunk_elements(device: torch.device) -> int:
    """Return the number of elements of one chunk on a device, for torch's present number of threads."""
    return CPU_CHUNK * min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else GPU_CHUNK


class Buffers(dict[object, torch.Tensor]):
    """Memory that the chunks of many weights share: it stays in the cache, and fresh pages are slow."""

    def take(self, name: object, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised contiguous tensor in the shape of `like`, valid until `name` is taken again."""
        key = name, dtype, like.device, torch.is_inference_mode_enabled()
        view = self.get((key, like.shape))
        if view is None:
            flat = self.get(key)
            if flat is None or flat.numel() < like.numel():
                flat = self[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
            view = self[key, like.shape] = flat[: like.numel()].view(like.shape)
        return view

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return values in another dtype, in a buffer; the tensor itself if it has that dtype."""
        return values if values.dtype == dtype else self.take(name, values, dtype).copy_(values)


def _copied(block: LowRankBlock) -> LowRankBlock:
    scale = None if block.scale is None else block.scale.detach().clone()
    return block._replace(left=block.left.detach().clone(), right=block.right.detach().clone(), scale=scale)


def _chunks(weight: torch.Tensor, blocks: list[LowRankBlock]) -> Iterator[LowRankBlock]:
    """Split blocks into blocks of at most chunk_elements."""
    elements = chunk_elements(weight.device)
    for block in blocks:
        rows, step = max(1, elements // max(1, block.right.shape[1])), block.stride or 1
        if block.left.shape[0] <= rows:
            yield block
            continue
        for first in range(0, block.left.shape[0], rows):
            part = block.part(slice(first, first + rows), EVERYTHING)
            yield part._replace(row=block.row + step * first)


def _window(weight: torch.Tensor, part: LowRankBlock) -> torch.Tensor:
    """Return a view of a part's rows and columns in a weight, or the weight itself if the part covers it."""
    rows, columns = part.left.shape[0], part.right.shape[1]
    if part.stride:
        return weight.as_strided((rows, columns), (part.stride, 1), weight.storage_offset() + part.row)
    window = weight if rows == weight.shape[0] else weight.narrow(0, part.row, rows)
    return window if columns * weight.shape[0] == weight.numel() else window.narrow(1, part.col, columns)


def _factors(part: LowRankBlock, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float32 if part.left.device.type == "mps" else torch.float64  # mps has no float64
    return part.left.to(wide) * scaling, part.right.to(wide)


def _merge_chunk_(
    weight: torch.Tensor, part: LowRankBlock, undo: Undo, buffers: Buffers, cost: list[float] | None
) -> None:
    """Write W' into a chunk, and note what differs after subtraction. In place."""
    window, factors = _window(weight, part), _factors(part, undo.scaling)
    new = _write_sum_(buffers.take("new", window, window.dtype), window, part, factors, buffers, cost)
    kept = window.clone() if part.values is not None else _differing(window, _taken_out(new, part, factors, buffers))
    undo.chunks.append(Chunk(part, kept, new))
    window.copy_(new)
    undo.chunks[-1] = Chunk(part, kept)


def _write_sum_(
    out: torch.Tensor,
    window: torch.Tensor,
    part: LowRankBlock,
    factors: tuple[torch.Tensor, torch.Tensor],
    buffers: Buffers,
    cost: list[float] | None,
) -> torch.Tensor:
    """Write W', rounded once, into `out`, which may be the window of W, and return `out`."""
    left, right = factors
    exact = buffers.take("exact", window, left.dtype).copy_(window)
    before = None
    if cost is not None:  # rows that are replaced may hold anything
        before = torch.nan_to_num(exact, 0.0, 0.0, 0.0, out=buffers.take("before", window, left.dtype))
    if part.values is not None:
        exact.copy_(part.values)
    elif window.dtype == left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(torch.mm(left, right).view(exact.shape))
    else:
        _as_matrix(exact, part).addmm_(left, right)
    if part.scale is not None:
        _as_matrix(exact, part).mul_(part.scale)
    out.copy_(exact)
    # The sum is cheap. A sum that is not finite may be an overflow of the sum itself, so then all values are looked at.
    if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
        raise NonFiniteError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    if cost is not None and before is not None:
        change = torch.sub(exact, before, out=before)
        cost[1] += torch.linalg.vector_norm(change).item() ** 2
        cost[0] += torch.linalg.vector_norm(torch.sub(out, exact, out=change)).item() ** 2
    return out


def _taken_out(
    merged: torch.Tensor, part: LowRankBlock, factors: tuple[torch.Tensor, torch.Tensor], buffers: Buffers
) -> torch.Tensor:
    """Return round(W' / c - D), contiguous, in a buffer. D has the same bits each time."""
    left, right = factors
    delta = buffers.take("exact", merged, left.dtype)
    torch.mm(left, right, out=_as_matrix(delta, part))
    wide = merged
    if part.scale is not None:
        wide = buffers.take("wide", merged, left.dtype).copy_(merged)
        _as_matrix(wide, part).div_(part.scale)
    elif merged.dtype in (torch.float32, torch.bfloat16):  # float32 is near enough, and takes half the time
        delta = buffers.cast("delta", delta, torch.float32)
    return buffers.cast("back", torch.sub(wide, delta, out=delta), merged.dtype)


def _as_matrix(values: torch.Tensor, part: LowRankBlock) -> torch.Tensor:
    return values if values.dim() == 2 else values.view(part.left.shape[0], part.right.shape[1])


def _differing(window: torch.Tensor, back: torch.Tensor) -> Kept:
    """Return the positions at which `back` differs in bits, and W there; a copy of W if there are many."""
    bits = BITS[window.element_size()]
    positions = (window.view(bits) ^ back.view(bits)).flatten().nonzero().squeeze(1)
    if positions.numel() > KEEP_AT_MOST * window.numel():
        return window.clone()
    return positions.to(torch.int32), window.flatten().index_select(0, positions)
