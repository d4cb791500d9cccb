"""Files of torch.save: which are read, whose check sums are compared, and what is refused."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError
from lightning_lora.files.torch_archive import compare_check_sums, read_torch_file


def records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


@pytest.mark.parametrize(
    ("record", "whole", "refused"), [("version", False, True), ("data/0", False, False), ("data/0", True, True)]
)
def test_check_sums_are_compared_of_what_is_read(tmp_path, record: str, whole: bool, refused: bool):
    """Of a file whose tensors stay on the disk, all that is no tensor."""
    path = tmp_path / "a.pt"
    torch.save({"one": torch.ones(5, 3)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.find(next(data for name, data in records(path) if name.endswith(f"/{record}")))] ^= 1
    path.write_bytes(raw)
    with pytest.raises(LoRAError, match=f"{record}' is not what was written") if refused else nullcontext():
        compare_check_sums(path, whole=whole)


# --- which files are read ---


def test_old_files_of_torch_are_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for mmap in (False, True):
        assert read_torch_file(tmp_path / "old.bin", mmap=mmap)["a"].tolist() == [0, 1, 2]


def test_plain_values_beside_tensors_are_read_as_they_were(tmp_path):
    shared = ("a", ("b",) * 3)
    values = {"bytes": b"abc\xff", "keys": {shared: [shared] * 99}, "n": -(2**70), "s": {1, 2}}
    state = OrderedDict(a=torch.ones(2), b=nn.Parameter(torch.ones(2).half()))
    torch.save({"state_dict": state, "hyper_parameters": values}, tmp_path / "a.ckpt")
    assert read_torch_file(tmp_path / "a.ckpt")["hyper_parameters"] == values


def test_compressed_records_are_refused(tmp_path):
    """A memory mapping would take the compressed bytes for the tensor's."""
    torch.save({"0.lora_A": torch.zeros(2**12)}, tmp_path / "a.pt")
    content = records(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content:
            archive.writestr(name, data)
    for mmap in (False, True):
        with pytest.raises(LoRAError, match="is compressed, which torch"):
            read_torch_file(tmp_path / "a.pt", mmap=mmap)
