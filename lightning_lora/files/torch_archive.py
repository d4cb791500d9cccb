"""Read and write files of torch.save.

The files are zip archives of uncompressed records: one pickle, and one record for each storage. Each record has a check
sum.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from operator import gt
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import LoRAError, sentence
from ..progress import progress_bar
from . import inert_pickle
from .inert_pickle import find_placeholder
from .paths import PathLike, require_file

ARCHIVE = b"PK\x03\x04"  # first bytes of a file that torch.save wrote since torch 1.6
DATA = "/data/"  # in the names of the records that are storages
PART = 1 << 24  # bytes that are read or written at once


def read_torch_file(
    path: PathLike,
    device: str = "cpu",
    mmap: bool = False,
    *,
    plain: Collection[str] = (),
    trusted: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint or state dict that torch.save wrote.

    Args:
        path: of the file.
        device: "cpu", or "meta" to read no values.
        mmap: return tensors that lie in the file until they are read. Files of before torch 1.6 are read.
        plain: keys of a checkpoint, beside state_dict, that must hold no objects.
        trusted: unpickle all objects, which may run any code. Otherwise objects in a checkpoint, such as
            hyper-parameters, become placeholders: nothing that the file names is imported or called.

    Raises:
        LoRAError: there is no such file, it is truncated, it is no dictionary, or tensors lie inside objects.
    """
    require_file(path)
    try:
        if is_archive(path):
            compare_check_sums(path, whole=device == "cpu" and not mmap)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an error follows
            content = _load(path, device, mmap and is_archive(path), trusted)
    except LoRAError:
        raise
    except Exception as error:  # of a damaged file torch raises anything
        raise LoRAError(f"{path}: {_why_not_loaded(path, error)}") from error
    is_checkpoint = isinstance(content, dict) and "state_dict" in content
    found = find_placeholder({key: content.get(key) for key in ("state_dict", *plain)} if is_checkpoint else content)
    if found is not None:
        place, name = found
        raise LoRAError(
            f"{path}: holds objects other than plain types and tensors, and was not loaded: {place or 'it'} is of "
            f"{name}. In a checkpoint, only entries other than the state_dict may be objects; save tensors alone."
        )
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


def _load(source: PathLike, device: str, mmap: bool, trusted: bool) -> Any:
    if trusted:
        return torch.load(source, map_location=device, mmap=mmap, weights_only=False)
    load = partial(_load_within_records if device == "cpu" else torch.load, source, map_location=device, mmap=mmap)
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError:
        content = load(weights_only=False, pickle_module=inert_pickle) if is_archive(source) else None
        if find_placeholder(content) is None:  # torch refused the file for damage and not for an object
            raise
        return content


def _load_within_records(source: PathLike, *, map_location: str, **options: Any) -> Any:
    """Load a file, and refuse storages that are larger than their records: torch reads what lies behind these."""
    claimed: list[int] = []

    def note(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
        claimed.append(storage.nbytes())
        return storage

    content = torch.load(source, map_location=cast(Any, note), **options)
    held: list[int] = []
    if is_archive(source):
        with zipfile.ZipFile(source) as archive:
            held = [record.file_size for record in archive.infolist() if DATA in record.filename]
    # torch does not tell which storage lies in which record: the largest is compared with the largest, and so on.
    if any(map(gt, sorted(claimed, reverse=True), sorted(held, reverse=True))):
        raise ValueError("its tensors claim more bytes than its records hold")
    return content


def is_archive(path: PathLike) -> bool:
    """Return whether a file has the form that torch.save has written since torch 1.6."""
    with open(path, "rb") as file:
        return file.read(len(ARCHIVE)) == ARCHIVE


def compare_check_sums(path: PathLike, *, whole: bool = True) -> None:
    """Compare the records of an archive with their check sums. A check sum of zero was not computed.

    Args:
        path: of the archive.
        whole: also the records that hold tensors.

    Raises:
        LoRAError: a check sum differs, or a record is compressed.
        OSError, ValueError, zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise LoRAError(f"{path}: {record.filename!r} is compressed, which torch.save never does.")
            with archive.open(record) as opened:
                if not record.CRC or (DATA in record.filename and not whole):
                    continue
                try:
                    while opened.read(PART):  # zipfile compares at the record's end
                        pass
                except zipfile.BadZipFile as error:
                    raise LoRAError(
                        f"{path}: {record.filename!r} is not what was written: its check sum differs. Copy the file "
                        "again, or take another copy; the disk may be faulty."
                    ) from error


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
