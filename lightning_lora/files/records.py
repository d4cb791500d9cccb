"""List and check the records of an archive that torch.save wrote.

The files are zip archives of uncompressed records: one pickle, and one record for each storage. Each record has a check
sum.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import gt
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import LoRAError, sentence
from .limits import COPIES, FREE_BYTES, PICKLE_BYTES, check, check_names
from .paths import PathLike
from .pickle_check import check_pickle

LOCAL = 30  # bytes of a record's header before its name
ARCHIVE = b"PK\x03\x04"  # first bytes of a file that torch.save wrote since torch 1.6
END, END64, LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"  # first bytes of the parts at an archive's end
END_SIZE, END64_SIZE, LOCATOR_SIZE = 22, 56, 20
PICKLES = 5  # how many pickles a file begins with that torch.save wrote before torch 1.6
PART = 2**22  # bytes that are read at once
DATA = "/data/"  # in the names of the records that are storages


@dataclass(frozen=True)
class Record:
    """One record: its entry in the archive's directory, and where its bytes start in the file."""

    info: zipfile.ZipInfo
    start: int


def read_records(path: PathLike) -> list[Record]:
    """List the records of an archive.

    Raises:
        LoRAError: the file is no archive of uncompressed records.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            records = _records(file, path)
            for record in records:
                archive.open(record.info).close()  # compares the record's header with the directory
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, LoRAError):
            raise
        raise LoRAError(
            f"{path}: is damaged, or not in the format that torch.save has written since torch 1.6, so that it must be "
            f"loaded and saved again: {sentence(error)}"
        ) from error
    return records


def check_archive(path: PathLike, *, whole: bool, trusted: bool = False) -> list[int]:
    """Check a file of torch.save before it is read: the cost of reading it, and its check sums.

    Args:
        path: of a file that any version of torch wrote.
        whole: the whole file is about to be read, so compare all check sums. Otherwise compare only those of records
            that hold no tensor.
        trusted: do not check the pickle.

    Returns:
        The sizes in bytes of the records that hold tensors. A file from before torch 1.6 has no records: an empty list.

    Raises:
        LoRAError: a limit is exceeded, or a check sum differs.
        OSError, ValueError, zipfile.BadZipFile: the file is damaged in another way.
    """
    with open(path, "rb") as file:
        if file.read(len(ARCHIVE)) != ARCHIVE:
            if not trusted:
                file.seek(0)
                _check_old(file.read(PICKLE_BYTES.most), path)
            return []
        records = _records(file, path)
        for record in records:
            if whole or DATA not in record.info.filename:
                _compare_check_sum(path, file, record)
            if not trusted and record.info.filename.endswith("data.pkl"):
                check(PICKLE_BYTES, record.info.file_size, path)
                file.seek(record.start)
                check_pickle(file.read(record.info.file_size), path)
    return [record.info.file_size for record in records if DATA in record.info.filename]


def compare_check_sums(path: PathLike) -> None:
    """Raise LoRAError where the bytes of a record do not match its check sum."""
    with open(path, "rb") as file:
        for record in read_records(path):
            _compare_check_sum(path, file, record)


def check_sum(file: BinaryIO, record: Record) -> int:
    """Compute the CRC-32 of a record."""
    result, left = 0, record.info.file_size
    file.seek(record.start)
    while left and (data := file.read(min(left, PART))):
        result, left = zlib.crc32(data, result), left - len(data)
    return result


def check_tensors(
    content: Mapping[Any, Any],
    path: PathLike,
    held: Sequence[int] = (),
    *,
    without_values: bool = False,
) -> None:
    """Raise LoRAError where tensors, or their names, are larger than a file of this size can hold.

    Args:
        content: what was read.
        path: of the file.
        held: the sizes of the records that hold tensors, where the whole file was read. They are compared because
            torch 2.6 reads beyond the end of a record where the pickle claims more.
        without_values: the tensors are on the meta device, where each has a storage of its own.
    """
    stored: dict[int, int] = {}
    named: list[str] = []
    total, waiting, seen = 0, deque([content]), set()
    while waiting:
        item: Any = waiting.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.layout == torch.strided and (without_values or not item.is_meta):
                storage = item.untyped_storage()
                stored[storage._cdata] = storage.nbytes()
                total += item.numel() * item.element_size()
        elif isinstance(item, Mapping):
            named.extend(k for k, value in item.items() if isinstance(k, str) and isinstance(value, torch.Tensor))
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(item)
    check_names(named, path)
    claimed = sorted(stored.values(), reverse=True)
    if any(map(gt, claimed, sorted(held, reverse=True))):
        raise LoRAError(
            f"{path}: cannot be read as a checkpoint; its tensors claim more bytes than its records hold, so it is "
            "damaged."
        )
    size = Path(path).stat().st_size
    # On the meta device each view has a storage of its own, so that stored bytes would count several times.
    own = size if without_values else sum(stored.values())
    if own > size:
        raise LoRAError(f"{path}: has {size} bytes, and its tensors claim {own}; the file is damaged.")
    if total > FREE_BYTES:
        check(COPIES, total // max(1, own), path)


def _records(file: BinaryIO, path: object) -> list[Record]:
    with zipfile.ZipFile(file) as archive:
        size = _check_end(path, file)
        records = [Record(info, _start(file, info)) for info in archive.infolist()]
    for record in records:
        if record.info.compress_type != zipfile.ZIP_STORED or record.info.compress_size != record.info.file_size:
            raise LoRAError(f"{path}: {record.info.filename!r} is compressed, which torch.save never does.")
    if sum(record.info.file_size for record in records) > size:
        raise LoRAError(f"{path}: its records claim more than its {size} bytes; they overlap, or it was cut.")
    return records


def _check_end(path: object, file: BinaryIO) -> int:
    """Check that the archive's one directory is at its end, where every reader looks. Return the file's size.

    Readers that found different directories would see different content.
    """
    size = file.seek(0, 2)
    last = END_SIZE + LOCATOR_SIZE + END64_SIZE
    file.seek(max(0, size - last))
    tail = file.read().rjust(last, b"\0")
    end, locator, end64 = tail[-END_SIZE:], tail[END64_SIZE:-END_SIZE], tail[:END64_SIZE]
    if locator.startswith(LOCATOR):  # zip64
        place, begins = size - last, end64.startswith(END64)
        length, start = (int.from_bytes(end64[at : at + 8], "little") for at in (40, 48))
    else:
        place, begins = size - END_SIZE, True
        length, start = (int.from_bytes(end[at : at + 4], "little") for at in (12, 16))
    if not begins or not end.startswith(END) or start + length != place:
        raise ValueError("its directory is not at its end")
    return size


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(LOCAL)
    names, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + LOCAL + names + extra


def _compare_check_sum(path: object, file: BinaryIO, record: Record) -> None:
    """Raise LoRAError where the bytes of a record do not match its check sum. A check sum of zero was not computed."""
    if record.info.CRC and check_sum(file, record) != record.info.CRC:
        raise LoRAError(
            f"{path}: {record.info.filename!r} is not what was written: its check sum differs. Copy the file again, or "
            "take another copy; the disk may be faulty."
        )


def _check_old(content: bytes, path: object) -> None:
    """Check the pickles at the beginning of a file from before torch 1.6."""
    at = 0
    for _ in range(PICKLES):
        at = check_pickle(content, path, at)
