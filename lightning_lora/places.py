"""Where a tensor's bytes lie in a file, and how to read them: whole, some rows, or a few elements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import LoRAError
from .header import build_header
from .state import sample_places

CHUNK = 2**21  # elements that are in memory at once; more is not faster


@dataclass(frozen=True)
class Place:
    """One tensor in a file. `in_order`: its elements follow each other there; others can be copied, not read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    in_order: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Their size."""
        return self.numel * self.dtype.itemsize

    def chunks(self, block: int = 1) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of parts of limited size, each of whole blocks of so many elements or one row."""
        rows = self.shape[0] if self.shape else 1
        columns = max(1, self.numel // max(1, rows))
        rows_of_block = max(1, block // columns)
        step = rows_of_block * max(1, CHUNK // (rows_of_block * columns))
        for first in range(0, rows, step):
            yield first, min(step, rows - first)


def read_rows(file: BinaryIO, place: Place, first: int, count: int) -> torch.Tensor:
    """Some rows of a tensor, from its open file; a scalar is one row."""
    row = place.nbytes // max(1, place.shape[0] if place.shape else 1)
    shape = (count, *place.shape[1:]) if place.shape else ()
    return _read(file, place, first * row, count * row).view(shape)


def read_tensor(place: Place) -> torch.Tensor:
    """The whole tensor."""
    with open(place.file, "rb") as file:
        return read_rows(file, place, 0, place.shape[0] if place.shape else 1)


def print_at(place: Place) -> dict[str, Any]:
    """The tensor's entry in a fingerprint, from a few elements."""
    size = place.dtype.itemsize
    with open(place.file, "rb") as file:
        elements = [_read(file, place, index * size, size) for index in sample_places(place.numel)]
    values = [float(element.double()) for element in elements]
    return {"shape": list(place.shape), "dtype": str(place.dtype).removeprefix("torch."), "values": values}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the same bytes for the same tensors, wide dtypes first so that all are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    with open(path, "xb") as file:
        file.write(build_header([(n, t.dtype, tuple(t.shape)) for n, t in ordered.items()], metadata))
        for tensor in ordered.values():
            file.write(as_bytes(tensor))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements, in order, as something that a file can write."""
    flat = tensor.detach().contiguous().view(-1)
    return _memory(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def _memory(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _read(file: BinaryIO, place: Place, offset: int, nbytes: int) -> torch.Tensor:
    if not place.in_order:
        raise LoRAError(f"{place.file}: a tensor is stored out of order; call .contiguous() on it before saving.")
    if not nbytes:
        return torch.empty(0, dtype=place.dtype)
    flat = torch.empty(nbytes, dtype=torch.uint8)
    file.seek(place.start + offset)
    got = file.readinto(_memory(flat))  # type: ignore[attr-defined]
    if got != nbytes:
        raise LoRAError(f"{place.file}: ends before the bytes that its header describes; it was cut or is changing.")
    return flat.view(place.dtype)
