"""The merge arithmetic on one weight: add s * B @ A in place, take it out again bit for bit.

Per block of rows, with D = s * B @ A in float64, and d its value in the dtype of the subtraction (float32 for bfloat16
and float32):

    merge:    new = round(W + D); back = round(new - d); keep W where back's bits differ; W <- new
    unmerge:  W <- round(W - d); W[kept] <- the kept values

Adding and subtracting alone drifts; a full copy doubles the memory. This keeps the few per cent of values that
subtraction would not bring back, and its own copies of A and B, so that d is the same bits both times. Why float64: in
float32, B @ A is off by many ulp where W and D are both small, and autocast and the matmul precision settings would
change its bits; for thin factors it costs the same. Blocks and buffers stay in the cache, because fresh pages cost
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
from .low_rank import Piece

CPU_BLOCK, GPU_BLOCK = 2**18, 2**24  # elements; small enough for the caches, large enough to fill a card

KEEP_AT_MOST = 0.25  # above this share of a block, a plain copy of it serves

Bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Kept:
    """What taking a delta out again needs: the factors and, per block, values or a plain copy.

    Attributes:
        pieces: own copies of the factors.
        scaling: s.
        blocks: one entry a merged block, in order: positions and values, or a copy of the block.
        copy: a plain copy of the whole weight, which makes the rest unnecessary.
        bits, integers: check value of the weight before the merge, and as what it was summed.
        threads: the number of threads that computed d, which can change its last bits.
    """

    pieces: list[Piece]
    scaling: float = 1.0
    copy: torch.Tensor | None = None
    blocks: list[tuple[torch.Tensor, torch.Tensor] | torch.Tensor] = field(default_factory=list)
    bits: int = 0
    integers: torch.dtype = torch.int64
    threads: int = 0

    def nbytes(self) -> int:
        """Bytes held, without the copies of the factors."""
        tensors = [] if self.copy is None else [self.copy]
        for block in self.blocks:
            tensors += block if isinstance(block, tuple) else [block]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def add_delta_(
    weight: torch.Tensor,
    pieces: list[Piece],
    scaling: float,
    *,
    copy: bool = False,
    observe: Observer | None = None,
) -> Kept:
    """weight += scaling * (the pieces), in place, each element rounded once.

    Args:
        weight: any shape, floating point.
        pieces: the factors, in any floating dtype.
        scaling: s.
        copy: keep a plain copy of the weight instead of the values that subtraction would miss.
        observe: called for each block with the rounded sum, the exact sum and the delta, all in float64.

    Returns:
        What remove_delta_ needs.

    Raises:
        LoRAError: a value of the sum is not finite. The weight is then as it was.
    """
    with exact_arithmetic(weight):
        kept = Kept([], copy=SPARES.copy_of(weight)) if copy else _kept_values(weight, pieces, scaling)
        try:
            scratch = Scratch(weight, CPU_BLOCK)
            for block, left, right in _blocks(weight, _scaled(pieces, scaling, weight.device)):
                _merge_block(block, left, right, scratch, kept, observe)
        except BaseException:
            _restore(weight, kept)
            raise
    return kept


def remove_delta_(weight: torch.Tensor, kept: Kept) -> None:
    """Undo add_delta_, bit for bit. `kept` is used up.

    Raises:
        LoRAError: the weight's bits are not what they were before the merge: something else changed it meanwhile.
    """
    with exact_arithmetic(weight, kept.threads):
        _restore(weight, kept)
        if kept.copy is not None:
            SPARES.take_back(kept.copy)
        elif _bits_sum(weight, kept.integers) != kept.bits:
            raise LoRAError(
                "the restored weight is not bit for bit what it was before merging; it was changed while it was "
                "merged, or this machine computes differently. Load the base weights again before you go on"
            )


def restored(weight: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The weight as it was before add_delta_, as a new tensor; `weight` and `kept` are left alone."""
    with exact_arithmetic(weight):
        if kept.copy is not None:
            return kept.copy.clone(memory_format=torch.preserve_format)
        original = weight.detach().clone(memory_format=torch.preserve_format)
        remove_delta_(original, replace(kept, blocks=list(kept.blocks)))
    return original


def merged_weight(weight: torch.Tensor, pieces: list[Piece], scaling: float) -> torch.Tensor:
    """W' as a new tensor: what add_delta_ would have written."""
    with exact_arithmetic(weight):
        merged = weight.detach().clone(memory_format=torch.preserve_format)
        scratch = Scratch(weight, CPU_BLOCK)
        for block, left, right in _blocks(merged, _scaled(pieces, scaling, weight.device)):
            new, _ = _rounded_sum(block, left, right, scratch, block)
            block.copy_(new)
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


def _kept_values(weight: torch.Tensor, pieces: list[Piece], scaling: float) -> Kept:
    own = [piece._replace(left=piece.left.detach().clone(), right=piece.right.detach().clone()) for piece in pieces]
    integers = _integers(weight)
    bits = _bits_sum(weight, integers)
    return Kept(own, scaling, bits=bits, integers=integers, threads=torch.get_num_threads())


def _scaled(pieces: list[Piece], scaling: float, device: torch.device) -> list[Piece]:
    """The factors in the dtype of the arithmetic, the scaling folded into left."""
    compute = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    return [
        piece._replace(
            left=piece.left.detach().to(compute).mul(scaling).contiguous(),
            right=piece.right.detach().to(compute).contiguous(),
        )
        for piece in pieces
    ]


def _blocks(weight: torch.Tensor, pieces: list[Piece]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Views of the weight, block by block, each with its factors."""
    for piece in pieces:
        for start in _starts(weight, piece):
            yield _block(weight, piece, start)


def _starts(weight: torch.Tensor, piece: Piece) -> range:
    most = CPU_BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    return range(0, piece.left.shape[0], max(1, most // max(1, piece.right.shape[1])))


def _block(weight: torch.Tensor, piece: Piece, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, width = piece.left[start : start + _starts(weight, piece).step], piece.right.shape[1]
    block = weight.detach()
    if len(left) < len(weight):
        block = block.narrow(0, piece.row + start, len(left))
    if width * len(weight) != weight.numel():
        block = block.narrow(1, piece.col, width)
    return block, left, piece.right


def _merge_block(
    block: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scratch: Scratch,
    kept: Kept,
    observe: Observer | None,
) -> None:
    target = scratch.take("new", block.shape, block.dtype) if kept.copy is None else block  # a copy: nothing to compare
    new, exact = _rounded_sum(block, left, right, scratch, target)
    if observe or kept.copy is None:
        delta = _delta(block, left, right, scratch)
    if observe:
        observe(new.to(delta.dtype), exact, delta)
    if kept.copy is None:
        kept.blocks.append(_differing(block, _subtract(new, delta, scratch)))
    if new is not block:
        block.copy_(new)


def _rounded_sum(
    block: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scratch: Scratch, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """W' of a block in the weight's dtype, in `target` unless that is the arithmetic's too, and in the arithmetic's."""
    exact = scratch.take("exact", block.shape, left.dtype).copy_(block)
    if block.dtype == left.dtype:  # no wider dtype to sum in: one rounding needs D first
        exact.add_(_delta(block, left, right, scratch))
    else:
        exact.view(left.shape[0], right.shape[1]).addmm_(left, right)
    new = exact if exact.dtype == target.dtype else target.copy_(exact)
    # A sum is cheap, and finite where all values are, but for an overflow of its own.
    total = new.sum(dtype=torch.promote_types(new.dtype, torch.float32)).item()
    if not math.isfinite(total) and not torch.isfinite(new).all():
        raise LoRAError("W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype)")
    return new, exact


def _delta(block: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """D of a block, in a buffer."""
    product = scratch.take("delta", torch.Size((left.shape[0], right.shape[1])), left.dtype)
    return torch.mm(left, right, out=product).view(block.shape)


def _subtract(merged: torch.Tensor, delta: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """What unmerging would leave without the kept values, in the weight's dtype, in a buffer; delta is used up."""
    delta = scratch.cast("difference", delta, scratch.difference)
    wide = torch.sub(merged, delta, out=delta)
    return scratch.cast("back", wide, merged.dtype)


def _differing(block: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    bits = Bits[block.element_size()]
    changed = (block.view(bits) ^ back.view(bits)).flatten().nonzero().squeeze(1)
    if changed.numel() > KEEP_AT_MOST * block.numel():
        return block.clone(memory_format=torch.preserve_format)
    return changed.to(torch.int32), block.flatten().index_select(0, changed)


def _restore(weight: torch.Tensor, kept: Kept) -> None:
    """Undo the merged blocks, last first; each is struck off when it is done, so that a failure can be taken up."""
    if kept.copy is not None:
        weight.detach().copy_(kept.copy)
        return
    pieces = _scaled(kept.pieces, kept.scaling, weight.device)
    places = [(piece, start) for piece in pieces for start in _starts(weight, piece)]
    scratch = Scratch(weight, CPU_BLOCK)
    while kept.blocks:
        piece, start = places[len(kept.blocks) - 1]
        record = kept.blocks[-1]
        block, left, right = _block(weight, piece, start)
        if isinstance(record, torch.Tensor):
            block.copy_(record)
        else:
            back = _subtract(block, _delta(block, left, right, scratch), scratch)
            back.view(-1).index_copy_(0, record[0].long(), record[1])
            block.copy_(back)
        kept.blocks.pop()


def _bits_sum(weight: torch.Tensor, integers: torch.dtype) -> int:
    """An order-independent check value of the weight's bits."""
    weight = weight.detach()
    return int((weight.view(-1) if weight.is_contiguous() else weight).view(integers).sum(dtype=torch.int64))


def _integers(weight: torch.Tensor) -> torch.dtype:
    """What to sum the weight's bits as: whole words where its memory allows it, which is many times faster."""
    whole = weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0
    return torch.int64 if whole else Bits[weight.element_size()]


SPARE_BYTES = 64 * 2**20


class Scratch:
    """Buffers that every block of a weight uses again.

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

    def copy_of(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the weight, with its strides."""
        free = self.free.get(self._key(weight)) if weight.is_contiguous() and weight.device.type == "cpu" else None
        if not free:
            return weight.detach().clone(memory_format=torch.preserve_format)
        spare = free.pop()
        self.nbytes -= spare.nbytes
        return spare.copy_(weight.detach())

    def take_back(self, copy: torch.Tensor) -> None:
        """Nothing else may use the copy from now on."""
        wanted = copy.is_contiguous() and copy.device.type == "cpu"
        if wanted and self.nbytes + copy.nbytes <= SPARE_BYTES:
            self.nbytes += copy.nbytes
            self.free.setdefault(self._key(copy), []).append(copy)

    def _key(self, tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bool]:
        return tensor.dtype, tensor.shape, tensor.is_inference()


SPARES = Spares()
