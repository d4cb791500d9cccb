"""The merge arithmetic on one weight: add s * B @ A in place, and restore every bit afterwards.

A weight is merged in chunks of rows, on every device in the same way. D = s * B @ A in float64:

    merge:    W' = round(c * (W + D)); keep W where round(W' / c - D - e) or round(W' / c - D + e) has other bits than W
    unmerge:  W <- round(W' / c - D); W[kept positions] <- the kept values

The sum with -D is in float32 for weights of 16 bits, and of 32 bits without a scale c (_descaled): that takes half the
time. Merging tries both ends by the same steps, so what this rounding changes is kept too.

Why values are kept: adding and subtracting alone drifts, and a full copy doubles the memory. Subtraction misses a few
per cent of the values, and only these are kept. Of a small model plain copies are kept: one of 24 layers of 768 or of
200 of 64 then merges and unmerges 2.3 to 4.9 times as fast. Trained rows have no D: W' are their values, and W's rows
are kept. A weight as wide as D is copied, too.

Why the restore is right on any machine, which is proved: the bits of B @ A depend on the number of threads, the library
and the card, so unmerging may compute another D than merging did.
- e is more than any two such products can differ (_error_bound).
- Each step after the product (to add -D to W' / c, to cast) is monotonic in -D, in an order in which -0 comes before
  +0. So where -D - e and -D + e both give W's bits, everything between them does.
- -D is added, not D subtracted, because a zero has two signs. W = -0 and D = +0 give W' = +0. From there -D = -0 gives
  +0, which has not the bits of W. So W is kept, as wherever one of the two zeros would not give it back.
- W' / c has the same bits each time, because W' and c do. It does not depend on D.

Why float64: in float32, B @ A is off by many ulp where W and D are both small, and autocast and settings of precision
would change its bits; they leave float64 alone. A merge needs 2 r operations a weight, as a forward of r tokens does.
A D in float32 for 16-bit weights was tried: e is then so large that 20 % of the values are kept at 1 % of W's norm and
r = 256, and up to 221 of a million values of W' are not the nearest.

Why chunks: a chunk and its buffers stay in the cache. Fresh pages of memory cost more than the arithmetic.

The sum of the bits of W' shows whether a weight was changed while it was merged.

Live merging, merged saving and the command line all come here: no other file writes or saves a merged weight. For
one forward three others compute a W' that is differentiable and not exact: adapted_weights.py, factored_weight.py and
token_rows.py.
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
from .low_rank import EVERYTHING, LowRankBlock, widest_dtype

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

    scaling: float = 1.0  # s
    # Both are None until the merge has come to its end. That of W' tells an edit, however W is kept. That of W is a
    # safety net where W is computed: under products without the usual bound, or a changed mode of flushing denormals.
    merged_checksum: int | None = None  # checksum of W'; None also once unmerging has begun to write
    base_checksum: int | None = None  # checksum of W; None also where all of W was to be copied
    chunks: list[Chunk] = field(default_factory=list)  # in order; each is noted before it is written
    edited: bool = False  # unmerging found that something else had changed W'
    lost: bool = False  # unmerging did not bring W back

    def is_copied(self) -> bool:
        """Return whether plain copies alone are kept."""
        return not any(isinstance(each.kept, tuple) for each in self.chunks)

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
    undo.scaling = scaling
    with exact_arithmetic(weight):
        try:
            elements = sum(block.left.shape[0] * block.right.shape[1] for block in blocks)
            base = None if copies is not None and elements == weight.numel() else checksum(weight)
            for block in blocks:
                mine = block
                if copies is None:  # the factors are needed once more, and training may change them meanwhile
                    scale = None if block.scale is None else block.scale.detach().clone()
                    left, right = block.left.detach().clone(), block.right.detach().clone()
                    mine = block._replace(left=left, right=right, scale=scale)
                # Trained rows have no D. A weight as wide as D is copied: nothing is rounded away between the ends.
                computed = copies is None and block.values is None and weight.dtype != widest_dtype(weight.device)
                largest = block.right.abs().amax() if computed else None
                for part in _chunks(weight, [mine]):
                    _merge_chunk_(weight, part, undo, buffers, cost, copies, largest)
            undo.base_checksum, undo.merged_checksum = base, checksum(weight)
        except BaseException:
            unmerge_weight_(weight, undo)
            raise
    return undo


def unmerge_weight_(weight: torch.Tensor, undo: Undo, buffers: Buffers | None = None) -> None:
    """Undo merge_weight_ bit for bit, as far as it went, and use `undo` up. In place.

    If an exception breaks this call off, another call continues.

    Raises:
        LoRAError: something else wrote to the merged weight. `undo.lost` says whether that changed W.
    """
    with exact_arithmetic(weight):
        buffers = Buffers() if buffers is None else buffers
        if undo.merged_checksum is not None:
            undo.edited = checksum(weight) != undo.merged_checksum
            undo.merged_checksum = None  # first: a call after a broken one would take what that wrote for an edit
        while undo.chunks:
            part, kept, new = undo.chunks[-1]
            window = _window(weight, part)
            if isinstance(kept, tuple):
                if new is not None:
                    window.copy_(new)
                positions, values = kept
                change = _negated(window, part, _factors(part, undo.scaling), buffers)
                kept = _rounded_sum(_descaled(window, part, change.dtype, buffers), change, window.dtype, buffers)
                kept.view(-1).index_copy_(0, positions.long(), values)
                undo.chunks[-1] = Chunk(part, kept)  # a plain copy, which is right before and after the write
            window.copy_(kept)
            undo.chunks.pop()
        undo.lost = undo.base_checksum is not None and checksum(weight) != undo.base_checksum
    if undo.lost:
        raise LoRAError(
            "the restored weight is not bit for bit the weight before merging: "
            + ("it was changed while it was merged" if undo.edited else "B @ A was computed beyond its error bound")
            + ". Load the base weights again before you go on"
        )
    if undo.edited:
        raise LoRAError(
            "the weight was changed while it was merged; the change was undone. Change weights while the model is "
            "unmerged"
        )


def restored_weight(weight: torch.Tensor, undo: Undo) -> torch.Tensor:
    """Return a new tensor with the values before merge_weight_. `weight` and `undo` stay unchanged.

    Raises:
        LoRAError: something else changed the merged weight, so that W cannot be computed from it.
    """
    undo = replace(undo, chunks=list(undo.chunks))
    with exact_arithmetic(weight):
        original = weight.detach().clone()
        try:
            unmerge_weight_(original, undo)
        except LoRAError:  # raised by unmerging too, if the values are W in spite of the change
            if undo.lost:
                raise
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


def exact_arithmetic(weight: torch.Tensor) -> AbstractContextManager[None]:
    """Allow writing to a weight in place, whatever modes of torch surround the call.

    Inside, no gradients are recorded. Inference mode is on if and only if the weight is an inference tensor.
    """
    inference, device = weight.is_inference(), weight.device.type
    changes_modes = torch.is_grad_enabled() or torch.is_inference_mode_enabled() != inference
    if changes_modes or torch.is_autocast_enabled(device):
        return _changed_modes(inference, device)
    return nullcontext()  # merge() has entered the modes already; entering takes as long as a small operation


@contextmanager
def _changed_modes(inference: bool, device: str) -> Iterator[None]:
    with torch.inference_mode(inference), torch.no_grad(), without_autocast(device):
        yield


def checksum(weight: torch.Tensor) -> int:
    """Return the sum of a weight's bits, wherever its memory lies. 64-bit words are many times faster than others."""
    flat = weight.reshape(-1)
    words = 8 // flat.element_size()
    if flat.numel() % words:
        return int(flat.view(BITS[flat.element_size()]).sum())
    aligned = flat.clone() if flat.storage_offset() % words else flat
    return int(aligned.view(torch.int64).sum()) if flat.numel() else 0


def row_chunks(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
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
    """Return s * left and right in the dtype of D."""
    wide = widest_dtype(part.left.device)
    return part.left.to(wide) * scaling, part.right.to(wide)


def _merge_chunk_(
    weight: torch.Tensor,
    part: LowRankBlock,
    undo: Undo,
    buffers: Buffers,
    cost: list[float] | None,
    copies: Buffers | None,
    largest: torch.Tensor | None,
) -> None:
    """Write W' into a chunk, and keep what unmerging cannot compute. In place. `copies` may be in use for others.

    `largest` is the largest absolute value of the block's right factor; None if the chunk is copied.
    """
    window, factors = _window(weight, part), _factors(part, undo.scaling)
    if largest is None:
        memory = Buffers() if copies is None else copies
        undo.chunks.append(Chunk(part, memory.take(len(undo.chunks), window, window.dtype).copy_(window)))
        _write_sum_(window, window, part, factors, buffers, cost)
        return
    new = _write_sum_(buffers.take("new", window, window.dtype), window, part, factors, buffers, cost)
    kept = _uncertain(window, new, part, factors, largest, buffers)
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


def _error_bound(left: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return e (m, 1): in each row of left @ right, two products differ by less, whatever the order of their sums.

    The error of a sum of r products is at most r * eps / 2 times the sum of their absolute values; e is twice the
    difference of two such sums. In float64 no product of float32 factors underflows.
    """
    terms = left.abs().sum(1, keepdim=True) * largest  # of abs(right)
    return terms * (2 * (left.shape[1] + 4) * torch.finfo(left.dtype).eps)


def _negated(
    like: torch.Tensor, part: LowRankBlock, factors: tuple[torch.Tensor, torch.Tensor], buffers: Buffers
) -> torch.Tensor:
    """Return -D in the shape of `like`, in a buffer."""
    left, right = factors
    change = buffers.take("exact", like, left.dtype)
    torch.mm(left.neg(), right, out=_as_matrix(change, part))
    return change


def _descaled(merged: torch.Tensor, part: LowRankBlock, wide: torch.dtype, buffers: Buffers) -> torch.Tensor:
    """Return W' / c in the dtype in which -D is added: float32, which takes half the time, unless W' / c needs more.

    Torch adds two dtypes much more slowly than it casts and adds.
    """
    if part.scale is None:
        return buffers.cast("values", merged, torch.float32)
    values = buffers.take("values", merged, wide if merged.dtype == torch.float32 else torch.float32).copy_(merged)
    _as_matrix(values, part).div_(part.scale)
    return values


def _rounded_sum(values: torch.Tensor, change: torch.Tensor, dtype: torch.dtype, buffers: Buffers) -> torch.Tensor:
    """Return round(values + change), contiguous, in a buffer. It is monotonic in `change`, which stays."""
    change = buffers.cast("sum", change, values.dtype)  # the sum is written over it where that is a copy
    return buffers.cast("back", torch.add(values, change, out=buffers.take("sum", values, values.dtype)), dtype)


def _as_matrix(values: torch.Tensor, part: LowRankBlock) -> torch.Tensor:
    return values if values.dim() == 2 else values.view(part.left.shape[0], part.right.shape[1])


def _uncertain(
    window: torch.Tensor,
    merged: torch.Tensor,
    part: LowRankBlock,
    factors: tuple[torch.Tensor, torch.Tensor],
    largest: torch.Tensor,
    buffers: Buffers,
) -> Kept:
    """Return where -D - e or -D + e does not give back W's bits, and W there; a copy of W if that is in many places."""
    bits = BITS[window.element_size()]
    change, bound = _negated(window, part, factors, buffers), _error_bound(factors[0], largest)
    values = _descaled(merged, part, change.dtype, buffers)
    _as_matrix(change, part).sub_(bound)
    low = _rounded_sum(values, change, window.dtype, buffers).view(bits)
    differs = torch.bitwise_xor(low, window.view(bits), out=buffers.take("differs", window, bits))
    _as_matrix(change, part).add_(bound, alpha=2)
    high = _rounded_sum(values, change, window.dtype, buffers).view(bits)
    positions = differs.bitwise_or_(high.bitwise_xor_(window.view(bits))).flatten().nonzero().squeeze(1)
    if positions.numel() > KEEP_AT_MOST * window.numel():
        return window.clone()
    return positions.to(torch.int32), window.flatten().index_select(0, positions)
