"""Read and write safetensors files.

A file is eight bytes with the length of the header, the header (JSON), then the bytes of the tensors without gaps. All
that the header says is checked against the size of the file. A tensor is read whole, by rows, or by single elements, so
that a file of any size costs little memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import LoRAError
from ..progress import progress_bar
from .paths import PathLike, reading, require_file

SUFFIX = ".safetensors"
METADATA = "__metadata__"
CHUNK = 2**21  # elements in memory at once: more are not faster
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorLocation:
    """One tensor in a file.

    Attributes:
        file: its path.
        dtype: of the tensor.
        shape: of the tensor.
        start: position of its first byte in the file.
        in_order: its elements follow each other in the file. Tensors that are stored otherwise are copied, not read.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    in_order: bool = True

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """The size of the first dimension. A scalar has one row."""
        return self.shape[0] if self.shape else 1

    def chunks(self, block: int = 1) -> Iterator[tuple[int, int]]:
        """Divide the tensor into chunks of rows of limited size.

        Args:
            block: each chunk but the last holds a multiple of this many elements, or is a single row.

        Yields:
            The first row and the number of rows of each chunk.
        """
        columns = max(1, self.numel // max(1, self.rows))
        rows_of_block = max(1, block // columns)
        step = rows_of_block * max(1, CHUNK // (rows_of_block * columns))
        for first in range(0, self.rows, step):
            yield first, min(step, self.rows - first)


@dataclass(frozen=True)
class Header:
    """A file's header: metadata, the tensors in the order of their bytes, and `raw`, the bytes of the header."""

    metadata: dict[str, str]
    locations: dict[str, TensorLocation]
    raw: bytes


def read_safetensors(path: PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file onto the CPU, and the metadata of its header.

    The tensors share one piece of memory. They do not change with the file, as a mapping of it would.

    Raises:
        LoRAError: there is no such file, or it is no complete safetensors file.
    """
    require_file(path)
    header = read_header(Path(path))
    begin, size = len(header.raw), sum(location.nbytes for location in header.locations.values())
    with reading(path, "safetensors"), open(path, "rb", buffering=0) as file:
        file.seek(begin)
        content = _filled(file, size)
    if len(content) < size:
        raise LoRAError(f"{path}: ends before the bytes that its header describes; it was cut or is changing.")
    return {name: _part(content, begin, header.locations[name]) for name in sorted(header.locations)}, header.metadata


def _filled(file: BinaryIO, size: int) -> torch.Tensor:
    """Return the next bytes of a file, fewer where it ends."""
    content = torch.empty(size, dtype=torch.uint8)
    memory, done = _memory(content), 0
    while done < size and (count := file.readinto(memory[done:])):  # type: ignore[attr-defined]
        done += count
    return content[:done]


def _part(content: torch.Tensor, begin: int, location: TensorLocation) -> torch.Tensor:
    """Return a tensor out of the bytes of all, which begin at a position of the file."""
    start = location.start - begin
    part = content[start : start + location.nbytes]
    if start % location.dtype.itemsize:
        part = part.clone()  # torch views no number across the boundaries of its dtype
    return part.view(location.dtype).view(location.shape)


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the size of the file.

    Raises:
        LoRAError: the file is not complete, or tensors in the header overlap or leave gaps.
    """
    with reading(path, "safetensors"):
        size = path.stat().st_size
        with open(path, "rb") as file:
            raw = _raw(file, size)
        content = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = content.pop(METADATA, {})
        _require(all(isinstance(value, str) for value in metadata.values()), "metadata that is not text")
        locations = {name: _location(path, name, claim, len(raw)) for name, claim in content.items()}
    sizes = {name: location.nbytes for name, location in locations.items()}
    ordered = dict(sorted(locations.items(), key=lambda item: (item[1].start, sizes[item[0]])))
    end = len(raw)
    for name, location in ordered.items():
        if location.start != end:
            raise LoRAError(f"{path}: the bytes of {name!r} overlap others or leave a gap; the file is damaged.")
        end += sizes[name]
    if end != size:
        raise LoRAError(f"{path}: has {size} bytes, but its header describes {end}; it may be truncated.")
    return Header(metadata, ordered, raw)


def read_rows(file: BinaryIO, location: TensorLocation, first: int, count: int) -> torch.Tensor:
    """Read some rows of a tensor from its open file."""
    row = location.nbytes // max(1, location.rows)
    shape = (count, *location.shape[1:]) if location.shape else ()
    return _read(file, location, first * row, count * row).view(shape)


def read_elements(location: TensorLocation, positions: Sequence[int]) -> list[float]:
    """Read single elements of a tensor, at positions of the flattened tensor."""
    size = location.dtype.itemsize
    with open(location.file, "rb") as file:
        return [float(_read(file, location, position * size, size).double()) for position in positions]


def read_tensor(location: TensorLocation) -> torch.Tensor:
    """Read a whole tensor."""
    with open(location.file, "rb") as file:
        return read_rows(file, location, 0, location.rows)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Equal tensors give equal bytes. Wide dtypes come first, so that all are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = build_header([(n, t.dtype, tuple(t.shape)) for n, t in ordered.items()], metadata)
    nbytes = sum(tensor.nbytes for tensor in ordered.values())
    with progress_bar("writing", nbytes, "bytes") as advance:
        write_values(path, header, ordered.values(), advance)


def write_values(
    path: Path, header: bytes, values: Iterable[torch.Tensor], advance: Callable[[int], object] = lambda size: None
) -> None:
    """Write a safetensors file of which each tensor, or each piece of one, may be made when its turn comes.

    Args:
        path: of a new file.
        header: as build_header returns it.
        values: the tensors in the header's order, whole or in pieces. None is kept.
        advance: called with the number of bytes that were written.
    """
    with open(path, "xb") as file:
        file.write(header)
        for value in values:
            file.write(as_bytes(value))
            advance(value.nbytes)
            del value  # before the next one is made


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return all bytes before those of the tensors. The tensors follow in this order, without gaps."""
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if any("\ud800" <= each <= "\udfff" for each in name):
            raise LoRAError(f"{name!r}: is no text that a safetensors file can hold; rename that module.")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in order, as bytes that a file can write. Copies a tensor that is not contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return _memory(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def _raw(file: BinaryIO, size: int) -> bytes:
    first = file.read(8)
    length = int.from_bytes(first, "little")
    _require(len(first) == 8 and length <= size - 8, f"a header of {length} bytes")
    return first + file.read(length)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    _require(len(content) == len(pairs), "a name twice")
    return content


def _location(path: Path, name: str, claim: Mapping[str, Any], offset: int) -> TensorLocation:
    _require(claim.keys() == {"dtype", "shape", "data_offsets"}, f"{name!r} with other fields than expected")
    dtype, shape, (start, end) = claim["dtype"], claim["shape"], claim["data_offsets"]
    numbers = [*shape, start, end]
    _require(isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers), f"{name!r}: sizes")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{name!r}: dtype {dtype!r}")
    location = TensorLocation(path, DTYPES[dtype], tuple(shape), offset + start)
    needed = location.nbytes
    _require(needed == end - start, f"{name!r}: shape {shape} needs {needed} bytes and has {end - start}")
    return location


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(f"found {otherwise}")


def _read(file: BinaryIO, location: TensorLocation, offset: int, nbytes: int) -> torch.Tensor:
    if not location.in_order:
        raise LoRAError(f"{location.file}: a tensor is stored out of order; call .contiguous() on it before saving.")
    if not nbytes:
        return torch.empty(0, dtype=location.dtype)
    flat = torch.empty(nbytes, dtype=torch.uint8)
    file.seek(location.start + offset)
    if file.readinto(_memory(flat)) != nbytes:  # type: ignore[attr-defined]
        raise LoRAError(f"{location.file}: ends before the bytes that its header describes; it was cut or is changing.")
    return flat.view(location.dtype)


def _memory(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]
