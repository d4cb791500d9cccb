"""Files of torch.save: which are read, whose check sums are compared, and how a change in place keeps them right."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError
from lightning_lora.files.records import compare_check_sums, read_records
from lightning_lora.files.torch_archive import read_torch_file, set_check_sums, torch_locations

HAS_DESCRIPTOR, SIGNATURE = 0x08, b"PK\x07\x08"


class OnlyForward(io.BytesIO):
    """A stream, into which Python's zipfile writes check sums behind the records."""

    def seek(self, *args: Any) -> int:
        raise OSError("a stream")

    def tell(self) -> int:
        raise OSError("a stream")


def records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def in_header(path: Path) -> None:
    """As zipfile writes it: the check sum before the data."""
    content = records(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content:
            archive.writestr(name, data)


def behind_the_data(path: Path) -> None:
    """As zipfile writes it into a stream: in a descriptor that begins with a signature."""
    content, stream = records(path), OnlyForward()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in content:
            archive.writestr(name, data)
    path.write_bytes(stream.getvalue())


def behind_the_data_without_signature(path: Path) -> None:
    """In a descriptor of check sum and sizes alone, which the format allows too."""
    body, directory = b"", b""
    content = records(path)
    for name, data in content:
        sizes = zlib.crc32(data).to_bytes(4, "little") + 2 * len(data).to_bytes(4, "little")
        rest = len(name).to_bytes(2, "little") + bytes(2)
        begin, start = b"\x14\x00\x08\x00" + bytes(6), len(body).to_bytes(4, "little")
        body += b"PK\x03\x04" + begin + bytes(12) + rest + name.encode() + data + sizes
        directory += b"PK\x01\x02\x14\x00" + begin + sizes + rest + bytes(10) + start + name.encode()
    count, size, start = len(content).to_bytes(2, "little"), len(directory), len(body)
    end = b"PK\x05\x06" + bytes(4) + 2 * count + size.to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)
    path.write_bytes(body + directory + end)


def second_sums(path: Path) -> dict[str, tuple[int, int]]:
    """Of each record the check sum that stands beside its data, and the right one."""
    raw, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            header = raw[info.header_offset :][:30]
            start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            place = info.header_offset + 14
            if info.flag_bits & HAS_DESCRIPTOR:
                place = start + info.file_size
                place += 4 if raw[place : place + 4] == SIGNATURE else 0
            stored = int.from_bytes(raw[place : place + 4], "little")
            found[info.filename] = stored, zlib.crc32(raw[start : start + info.file_size])
    return found


@pytest.mark.parametrize(
    "form",
    [lambda path: None, in_header, behind_the_data, behind_the_data_without_signature],
    ids=["as torch.save writes it", "in the header", "behind the data", "without signature"],
)
def test_both_check_sums_of_a_record_that_was_changed_in_place_are_right_in_every_form_of_archive(tmp_path, form: Any):
    path = tmp_path / "a.pt"
    torch.save({"one": torch.ones(5, 3), "two": torch.arange(7.0)}, path)
    form(path)
    assert all(stored == right for stored, right in second_sums(path).values())
    size, one = path.stat().st_size, torch_locations(path)["one"]
    with open(path, "r+b") as file:
        file.seek(one.start)
        file.write(torch.full((5, 3), 2.0).numpy().tobytes())
    set_check_sums(path, [one])
    assert all(stored == right for stored, right in second_sums(path).values())
    assert path.stat().st_size == size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["one"], torch.full((5, 3), 2.0))
    assert torch.equal(content["two"], torch.arange(7.0))


@pytest.mark.parametrize(
    ("record", "whole", "refused"), [("version", False, True), ("data/0", False, False), ("data/0", True, True)]
)
def test_check_sums_are_compared_of_what_is_read(tmp_path, record: str, whole: bool, refused: bool):
    """Of a file whose tensors stay on the disk, all that is no tensor."""
    path = tmp_path / "a.pt"
    torch.save({"one": torch.ones(5, 3)}, path)
    place = next(each.start for each in read_records(path) if each.info.filename.endswith(f"/{record}"))
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(LoRAError, match=f"{record}' is not what was written") if refused else nullcontext():
        compare_check_sums(path, whole=whole)


# --- which files are read ---


def test_old_files_of_torch_are_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_torch_file(tmp_path / "old.bin")["a"].tolist() == [0, 1, 2]
    with pytest.raises(LoRAError, match=r"old\.bin: is not in the format that torch\.save has written since"):
        torch_locations(tmp_path / "old.bin")


def test_plain_values_beside_tensors_are_read_as_they_were(tmp_path):
    shared = ("a", ("b",) * 3)
    values = {"bytes": b"abc\xff", "keys": {shared: [shared] * 99}, "n": -(2**70), "s": {1, 2}}
    state = OrderedDict(a=torch.ones(2), b=nn.Parameter(torch.ones(2).half()))
    torch.save({"state_dict": state, "hyper_parameters": values}, tmp_path / "a.ckpt")
    assert read_torch_file(tmp_path / "a.ckpt")["hyper_parameters"] == values


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(tmp_path, compression: int):
    """A memory mapping would take the compressed bytes for the tensor's."""
    torch.save({"0.lora_A": torch.zeros(2**12)}, tmp_path / "a.pt")
    content = records(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "w", compression) as archive:
        for name, data in content:
            archive.writestr(name, data)
    for mmap in (False, True):
        with pytest.raises(LoRAError, match="is compressed, which torch"):
            read_torch_file(tmp_path / "a.pt", mmap=mmap)
