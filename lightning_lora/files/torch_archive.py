"""Read files of torch.save, and find where each tensor lies, so that a copy of the file can be changed in place.

The files are zip archives of uncompressed records, one for each storage. A copy keeps every byte but those of the
changed tensors and of their records' check sums.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from operator import gt
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import LoRAError, sentence
from ..names import META
from ..progress import progress_bar
from . import inert_pickle
from .inert_pickle import find_placeholder
from .paths import PathLike, require_file
from .records import ARCHIVE, Record, check_sum, compare_check_sums, is_archive, read_records
from .safetensors import TensorLocation

CENTRAL = 46  # bytes of a record's entry in the directory before the name
PART = 1 << 24  # bytes that are written at once
PLAIN = ("state_dict", META)  # keys of a checkpoint that must hold no objects
DESCRIPTOR = b"PK\x07\x08"
HAS_DESCRIPTOR = 0x08


def read_torch_file(
    path: PathLike,
    device: str | Callable[[Any, str], Any] = "cpu",
    mmap: bool = False,
    *,
    trusted: bool = False,
    has_objects: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint or state dict that torch.save wrote.

    Args:
        path: of the file.
        device: "cpu", "meta" to read no values, or any other map_location of torch.load.
        mmap: map the file into memory instead of reading it.
        trusted: unpickle all objects, which may run any code. Otherwise objects in a checkpoint, such as
            hyper-parameters, become placeholders: nothing that the file names is imported or called.
        has_objects: the file is known to hold objects. This saves a second reading.

    Raises:
        LoRAError: there is no such file, it is truncated, it is no dictionary, or tensors lie inside objects.
    """
    require_file(path)
    try:
        if is_archive(path):
            compare_check_sums(path, whole=device == "cpu" and not mmap)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an error follows
            content = _load(path, device, mmap, trusted, has_objects)
    except LoRAError:
        raise
    except Exception as error:  # of a damaged file torch raises anything
        raise LoRAError(f"{path}: {_why_not_loaded(path, error)}") from error
    _refuse_objects(content, path)
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a dictionary, found {type(content).__name__}.")
    return content


def _why_not_loaded(path: PathLike, error: Exception) -> str:
    """Return what to say of a file that torch.load refuses."""
    with open(path, "rb") as file:
        head = file.read(len(ARCHIVE))
    if head and not head.startswith((ARCHIVE, pickle.PROTO)):
        return "is no file of a known form: neither of torch.save nor safetensors."
    if isinstance(error, pickle.UnpicklingError):
        said = "holds objects other than plain types and tensors, or is damaged, and was not loaded"
        return f"{said}: {sentence(str(error).splitlines()[0])}"
    return f"cannot be read as a checkpoint; it may be truncated: {sentence(error)}"


def _refuse_objects(content: Any, path: PathLike) -> None:
    """Raise LoRAError where a placeholder is in a state dict, or in a checkpoint's state dict or adapter."""
    is_checkpoint = isinstance(content, dict) and "state_dict" in content
    found = find_placeholder({key: content.get(key) for key in PLAIN} if is_checkpoint else content)
    if found is not None:
        place, name = found
        raise LoRAError(
            f"{path}: holds objects other than plain types and tensors, and was not loaded: {place or 'it'} is of "
            f"{name}. Only what lies beside a checkpoint's state_dict may be an object; save tensors alone."
        )


def _load(
    source: PathLike, device: str | Callable[[Any, str], Any], mmap: bool, trusted: bool, has_objects: bool
) -> Any:
    load = partial(torch.load, source, map_location=device, mmap=mmap)
    if trusted:
        return load(weights_only=False)
    if device == "cpu" and not mmap:
        load = partial(_load_onto_cpu, source)
    if has_objects:
        return load(weights_only=False, pickle_module=inert_pickle)
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError:
        content = _load(source, device, mmap, trusted, True) if is_archive(source) else None
        if find_placeholder(content) is None:  # torch refused the file for damage and not for an object
            raise
        return content


def _load_onto_cpu(source: PathLike, **options: Any) -> Any:
    """Load a file, and refuse storages that are larger than their records: torch 2.6 reads what lies behind these."""
    claimed: list[int] = []

    def note(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
        claimed.append(storage.nbytes())
        return storage

    content = torch.load(source, map_location=cast(Any, note), **options)
    records = read_records(source) if is_archive(source) else []
    held = sorted((record.info.file_size for record in records if record.is_storage), reverse=True)
    if any(map(gt, sorted(claimed, reverse=True), held)):
        raise ValueError("its tensors claim more bytes than its records hold")
    return content


def write_torch_file(path: Path, content: Mapping[str, Any], nbytes: int) -> None:
    """Write a new file as torch.save does, with a progress bar.

    Args:
        path: of the file, which must not exist.
        content: what to save.
        nbytes: bytes of all tensors in it.
    """
    with open(path, "xb") as file, progress_bar("writing", nbytes, "bytes") as advance:
        try:
            torch.save(content, cast(BinaryIO, _InParts(file, nbytes, advance)))
        except RuntimeError as error:  # raised while torch closes the archive, and hides the error of the disk
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from None
            raise


class _InParts:
    """A file for torch.save that writes each storage in parts and reports them, at most `nbytes` in all."""

    def __init__(self, file: BinaryIO, nbytes: int, advance: Callable[[int], object]) -> None:
        self.file, self.left, self.advance = file, nbytes, advance

    def write(self, content: bytes | memoryview) -> int:
        """Write all of `content`."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), PART):
            size = min(self.file.write(view[start : start + PART]), self.left)  # the archive's own bytes do not count
            self.left -= size
            self.advance(size)
        return len(view)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def torch_locations(path: Path) -> dict[str, TensorLocation]:
    """Find where the tensors of a state dict lie in a file. The file is that state dict, or a checkpoint that holds it.

    Raises:
        LoRAError: the file is damaged, holds no state dict, or has a form that cannot be changed in place.
    """
    has_objects = find_placeholder(read_torch_file(path, "meta")) is not None
    if not is_archive(path):
        raise LoRAError(
            f"{path}: is not in the format that torch.save has written since torch 1.6. Load it and save it again with "
            "torch."
        )
    records = {
        record.start: record.info.file_size
        for record in read_records(path)
        if record.info.file_size and record.is_storage
    }
    storages: dict[int, int] = {}  # sizes by address

    def note(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
        return storage

    content = read_torch_file(path, note, mmap=True, has_objects=has_objects)  # a second reading would note twice
    # torch does not say where it mapped the file. But every record is the storage of some tensor, so the first record
    # begins where the first storage does.
    base = min(storages, default=0) - min(records, default=0)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise LoRAError(f"{path}: expected a state dict, found {type(state).__name__}.")
    locations = {
        name: _location(path, name, value, base, records)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if {address - base: size for address, size in storages.items()} != records:
        raise LoRAError(f"{path}: its records are not those of its tensors; the file is damaged.")
    return locations


def set_check_sums(path: PathLike, locations: list[TensorLocation]) -> None:
    """Write the check sums of an archive anew, after tensors were changed in place.

    Args:
        path: of the archive.
        locations: the changed tensors.
    """
    records = read_records(path)
    starts = sorted(record.start for record in records)
    changed = {starts[bisect_right(starts, location.start) - 1] for location in locations}
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    with open(path, "r+b") as file:
        for record in records:
            entry = directory
            directory += CENTRAL + _name_lengths(file, entry)
            if record.start not in changed:
                continue
            check = check_sum(file, record).to_bytes(4, "little")
            for position in (entry + 16, _second_position(file, record)):  # in the directory, and beside the data
                file.seek(position)
                file.write(check)


def _location(path: Path, name: str, tensor: torch.Tensor, base: int, records: Mapping[int, int]) -> TensorLocation:
    """Return where a tensor lies in the file that was mapped into memory at the address `base`."""
    if tensor.layout != torch.strided:
        raise LoRAError(f"{path}: {name!r} is a sparse tensor, which cannot be read in place.")
    if tensor.device.type != "cpu":
        raise LoRAError(f"{path}: {name!r} is on {tensor.device}, without values.")
    storage = tensor.untyped_storage()
    start = storage.data_ptr() - base if storage.nbytes() else 0
    if storage.nbytes() != records.get(start, 0):
        raise LoRAError(f"{path}: {name!r} claims bytes outside its record, or not all of them; the file is damaged.")
    first = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return TensorLocation(path, tensor.dtype, tuple(tensor.shape), first, tensor.is_contiguous())


def _name_lengths(file: BinaryIO, entry: int) -> int:
    file.seek(entry + 28)
    lengths = file.read(6)
    return sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2, 4))


def _second_position(file: BinaryIO, record: Record) -> int:
    """Return where a record's second check sum is: in a descriptor after the data, or in the header before the data."""
    if not record.info.flag_bits & HAS_DESCRIPTOR:
        return record.info.header_offset + 14
    end = record.start + record.info.file_size
    file.seek(end)
    return end + (4 if file.read(4) == DESCRIPTOR else 0)
