"""Read and write safetensors files.

The library reads them. They are written here, one tensor at a time: the library needs all of a file in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..errors import LoRAError
from ..progress import progress_bar
from .paths import PathLike, reading, require_file

SUFFIX = ".safetensors"
METADATA = "__metadata__"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class TensorFile(NamedTuple):
    """The tensors of a file, and the metadata of its header."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def open_safetensors(path: PathLike) -> TensorFile:
    """Return tensors that lie in the file until they are read, in memory that the system takes back when it needs it.

    They change with the file. The file does not change with them.

    Raises:
        LoRAError: there is no such file, or it is no complete safetensors file.
    """
    require_file(path)
    with reading(path, "safetensors"), safe_open(path, "pt") as file:
        return TensorFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def read_safetensors(path: PathLike) -> TensorFile:
    """Read the tensors of a safetensors file onto the CPU. They do not change with the file.

    They share one piece of memory, read at once: an adapter has hundreds of small tensors, and the library's calls for
    each take longer than the reading.

    Raises:
        LoRAError: there is no such file, or it is no complete safetensors file.
    """
    require_file(path)
    with reading(path, "safetensors"), open(path, "rb") as file:
        with safe_open(path, "pt") as checked:
            metadata = checked.metadata() or {}
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
        content = torch.empty(os.path.getsize(path) - begin, dtype=torch.uint8)
        if content.numel() and file.readinto(memoryview(content.numpy())) < content.numel():  # type: ignore[arg-type]
            raise ValueError("it was cut while it was read")
        return TensorFile({name: _view(content, header[name]) for name in sorted(header.keys() - {METADATA})}, metadata)


def _view(content: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    """Return the tensor of an entry of a header."""
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    values = content[start:end]
    if start % dtype.itemsize:
        values = values.clone()  # torch views no number across the boundaries of its dtype
    return values.view(dtype).view(entry["shape"])


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Equal tensors give equal bytes. Wide dtypes come first, so that all are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = build_header([(n, t.dtype, tuple(t.shape)) for n, t in ordered.items()], metadata)
    nbytes = sum(tensor.nbytes for tensor in ordered.values())
    with progress_bar("writing", nbytes, "bytes") as advance:
        write_values(path, header, ordered.values(), advance)


class Writer:
    """A new safetensors file. Each tensor, or each piece of one, may be made when its turn comes; none is kept.

    Args:
        path: of a new file.
        header: as build_header returns it; tensors follow in its order.
        advance: called with the number of bytes that were written.
    """

    def __init__(self, path: Path, header: bytes, advance: Callable[[int], object] = lambda size: None) -> None:
        self.file, self.advance = open(path, "xb"), advance  # noqa: SIM115 (closed by __exit__)
        try:
            self.file.write(header)
        except BaseException:  # a full disk: there is no writer yet that could close the file
            self.file.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        self.file.close()

    def write(self, value: torch.Tensor) -> None:
        """Write the next tensor, whole or the next piece of it."""
        self.file.write(as_bytes(value))
        self.advance(value.nbytes)


def write_values(
    path: Path, header: bytes, values: Iterable[torch.Tensor], advance: Callable[[int], object] = lambda size: None
) -> None:
    """Write a safetensors file of which each tensor is made when its turn comes; see Writer."""
    with Writer(path, header, advance) as writer:
        for value in values:
            writer.write(value)
            del value  # before the next one is made


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return all bytes before those of the tensors. The tensors follow in this order, without gaps."""
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if any("\ud800" <= each <= "\udfff" for each in name):
            raise LoRAError(f"{name!r}: is no text that a safetensors file can hold; rename that module.")
        if dtype not in NAMES:
            raise LoRAError(f"{name!r}: is of {dtype}, which is not written into safetensors files.")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in order, as bytes that a file can write. Copies a tensor that is not contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]
