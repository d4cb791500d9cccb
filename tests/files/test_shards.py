"""Folders of torch.distributed.checkpoint: read without torch's reader, which unpickles anything; damage is told."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from lightning_lora import LoRAError
from lightning_lora.files.shards import ShardedFolder
from support.distributed_folders import InParts, edit, write_sharded

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint8, torch.int64]
SHAPES = [(), (1,), (7,), (5, 4), (1, 9), (4, 3, 2), (0, 3), (2, 2, 2, 2)]


def read(folder: Path) -> dict[str, Any]:
    sharded = ShardedFolder(folder)
    return sharded.nested(sharded.read(list(sharded.entries)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write_sharded(tmp_path / "sharded", {"a": torch.randn(7, 5), "b": torch.randn(6), "c": [1, 2]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_in_parts_are_put_together(tmp_path: Path, dtype: torch.dtype):
    torch.manual_seed(0)
    values = {f"{shape}": (torch.randn(shape) * 3).to(dtype) for shape in SHAPES}
    found = read(write_sharded(tmp_path, {"state": values}))["state"]
    assert len(InParts.chunks(values["(5, 4)"].as_subclass(InParts))) == 9
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert type(found[name]) is torch.Tensor
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        same = found[name].contiguous().view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)
        assert torch.equal(*same)


def test_what_torch_reads_is_read(folder: Path):
    theirs = {"a": torch.empty(7, 5), "b": torch.empty(6)}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.load(theirs, checkpoint_id=folder)
    ours = read(folder)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert len(list(folder.glob("*.distcp"))) == 2


def test_nested_values_come_back_as_they_were_saved(tmp_path: Path):
    state = {"n": [1, 2], "l": [{"a": torch.ones(2)}, 3]}
    found = read(write_sharded(tmp_path, {"m": {"x._extra_state": state, "w": torch.ones(1)}, "k": "t"}))
    assert found["m"]["x._extra_state"].pop("l")[0]["a"].tolist() == [1, 1]
    assert found["m"].pop("w").tolist() == [1]
    assert found == {"m": {"x._extra_state": {"n": [1, 2]}}, "k": "t"}


def test_only_what_is_asked_for_is_read(folder: Path):
    sharded = ShardedFolder(folder)
    for file in folder.glob("*.distcp"):
        file.unlink()
    assert sharded.entries["a"].shape == (7, 5)
    assert sharded.read([]) == {}
    with pytest.raises(LoRAError, match=r"__0_\d.distcp: is missing, so that the distributed checkpoint is not whole"):
        sharded.read(["a"])


# --- code ---


class Runs:
    """Pickled code: unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def put_planner(description: Any, value: Any) -> None:
    description.planner_data["a"] = value


def put_storage(description: Any, value: Any) -> None:
    first = next(iter(description.storage_data))
    description.storage_data[first] = value


def put_chunk(description: Any, value: Any) -> None:
    description.state_dict_metadata["a"].chunks = value


def put_size(description: Any, value: Any) -> None:
    description.state_dict_metadata["a"].size = value


def replace(description: Any, value: Any) -> Any:
    return value


@pytest.mark.parametrize("put", [put_planner, put_storage, put_chunk, put_size, replace])
def test_description_runs_no_code(folder: Path, tmp_path: Path, put: Callable[[Any, Any], Any]):
    mark = tmp_path / "ran"
    edit(folder, lambda description: put(description, Runs(mark)))
    with pytest.raises(LoRAError, match=r"\.metadata: cannot be read as the description of shards"):
        read(folder)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert mark.exists()  # it would have


def test_description_that_names_code_is_refused_before_torch_reads_it(folder: Path, tmp_path: Path):
    ShardedFolder(folder).refuse_code()
    for value in (print, torch.nn.Linear, pickle.loads, Runs(tmp_path / "ran")):  # edit unpickles what was there
        edit(folder, lambda description, value=value: setattr(description, "version", value))
        with pytest.raises(LoRAError, match=r"\.metadata: names '.*', which torch would import and call"):
            ShardedFolder(folder).refuse_code()
    assert not (tmp_path / "ran").exists()


def test_shard_runs_no_code(tmp_path: Path):
    class Extra:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    found = read(write_sharded(tmp_path / "folder", {"a": torch.ones(2), "b": Extra()}))
    assert type(found["b"]).__name__ == "Placeholder"
    assert not (tmp_path / "ran").exists()


# --- damage ---


def test_folder_without_a_description_is_not_whole(folder: Path):
    (folder / ".metadata").unlink()
    with pytest.raises(LoRAError, match=r"\.metadata: is missing, so that the distributed checkpoint is not whole"):
        ShardedFolder(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_cut_description_is_told(folder: Path, share: float):
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(LoRAError, match=r"\.metadata: "):
        read(folder)


def test_cut_file_of_shards_is_told(folder: Path):
    file = min(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(LoRAError, match=r"distcp: has \d+ bytes, and does not hold what \.metadata says"):
        read(folder)


def test_flipped_bits_in_a_shard_are_told(folder: Path):
    for file in folder.glob("*.distcp"):
        content = file.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 40)):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            try:
                found = read(folder)  # a bit of padding, or of a name, changes nothing
            except LoRAError:
                continue
            file.write_bytes(content)
            expected = read(folder)
            assert all(torch.equal(found[name], expected[name]) for name in "ab")
        file.write_bytes(content)


def test_any_flipped_byte_of_the_description_is_a_lora_error_or_harmless(folder: Path):
    content = (folder / ".metadata").read_bytes()
    refused = 0
    for at in range(0, len(content), 11):
        (folder / ".metadata").write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            read(folder)
        except LoRAError:
            refused += 1
    assert refused > len(content) // 33


def storing(field: str, value: Any) -> Callable[[Any], None]:
    """Write another value into what is said of each part of "a"."""

    def edited(description: Any) -> None:
        for index, place in description.storage_data.items():
            if index.fqn == "a":
                setattr(place, field, value)

    return edited


def drop_storage(description: Any) -> None:
    description.storage_data = {i: place for i, place in description.storage_data.items() if i.fqn != "a"}


def drop_chunk(description: Any) -> None:
    del description.state_dict_metadata["a"].chunks[0]


def move_chunk(description: Any) -> None:
    description.state_dict_metadata["a"].chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 9]))


def resize_chunk(description: Any) -> None:
    description.state_dict_metadata["a"].chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 1]))


def other_dtype(description: Any) -> None:
    description.state_dict_metadata["a"].properties.dtype = torch.float16


def other_keys(description: Any) -> None:
    description.planner_data["a"] = ("b",)


DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no place": (drop_storage, "does not say where 'a' lies"),
    "a part is missing": (drop_chunk, "parts of 'a' are stored nowhere"),
    "a part outside": (move_chunk, "a part of 'a' lies outside of it"),
    "a smaller part": (resize_chunk, r"distcp: what lies at bytes \d+ to .* is not the part of 'a' that"),
    "another dtype": (other_dtype, r"distcp: what lies at bytes \d+ to .* is not the part of 'a' that"),
    "other keys": (other_keys, r"the keys of 'a' are \('b',\)"),
    "outside of the folder": (storing("relative_path", "../a"), "outside of the folder"),
    "the folder above": (storing("relative_path", ".."), "outside of the folder"),
    "an absolute path": (storing("relative_path", "/etc/passwd"), "outside of the folder"),
    "beyond the file": (storing("length", 10**12), "does not hold what"),
    "before the file": (storing("offset", -1), "lies outside of it"),
    "the same bytes": (storing("offset", 0), "shards overlap"),
    "no number": (storing("offset", "0"), "cannot be read as the description"),
    "compressed": (storing("transform_descriptors", ["zstd"]), "is not known here"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_description_that_does_not_fit_its_shards_is_told(folder: Path, case: str):
    change, said = DAMAGES[case]
    edit(folder, change)
    with pytest.raises(LoRAError, match=said):
        read(folder)
