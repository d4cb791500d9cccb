"""List the records of an archive that torch.save wrote, and compare their check sums.

The files are zip archives of uncompressed records: one pickle, and one record for each storage. Each record has a check
sum.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import LoRAError
from .paths import PathLike

LOCAL = 30  # bytes of a record's header before its name
ARCHIVE = b"PK\x03\x04"  # first bytes of a file that torch.save wrote since torch 1.6
PART = 2**22  # bytes that are read at once
DATA = "/data/"  # in the names of the records that are storages


@dataclass(frozen=True)
class Record:
    """One record: its entry in the archive's directory, and where its bytes start in the file."""

    info: zipfile.ZipInfo
    start: int

    @property
    def is_storage(self) -> bool:
        """Whether the record holds the bytes of tensors."""
        return DATA in self.info.filename


def is_archive(path: PathLike) -> bool:
    """Return whether a file has the form that torch.save has written since torch 1.6."""
    with open(path, "rb") as file:
        return file.read(len(ARCHIVE)) == ARCHIVE


def read_records(path: PathLike) -> list[Record]:
    """List the records of an archive.

    Raises:
        LoRAError: a record is compressed, so that its bytes in the file are not those of tensors.
        OSError, ValueError, zipfile.BadZipFile: the archive is damaged.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        records = [Record(info, _start(file, info)) for info in archive.infolist()]
        for record in records:
            if record.info.compress_type != zipfile.ZIP_STORED or record.info.compress_size != record.info.file_size:
                raise LoRAError(f"{path}: {record.info.filename!r} is compressed, which torch.save never does.")
            archive.open(record.info).close()  # compares the record's header with the directory
    return records


def compare_check_sums(path: PathLike, *, whole: bool = True) -> None:
    """Compare the bytes of an archive's records with their check sums. A check sum of zero was not computed.

    Args:
        path: of the archive.
        whole: also of records that hold tensors.

    Raises:
        LoRAError: a check sum differs, or a record is compressed.
        OSError, ValueError, zipfile.BadZipFile: the archive is damaged.
    """
    with open(path, "rb") as file:
        for record in read_records(path):
            is_compared = record.info.CRC and (whole or not record.is_storage)
            if is_compared and check_sum(file, record) != record.info.CRC:
                raise LoRAError(
                    f"{path}: {record.info.filename!r} is not what was written: its check sum differs. Copy the file "
                    "again, or take another copy; the disk may be faulty."
                )


def check_sum(file: BinaryIO, record: Record) -> int:
    """Compute the CRC-32 of a record."""
    result, left = 0, record.info.file_size
    file.seek(record.start)
    while left and (data := file.read(min(left, PART))):
        result, left = zlib.crc32(data, result), left - len(data)
    return result


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(LOCAL)
    names, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + LOCAL + names + extra
