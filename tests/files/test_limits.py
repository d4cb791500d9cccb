"""Small files that ask for gigabytes or hours are refused at once, each by a documented limit."""

from __future__ import annotations

import json
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lightning_lora.command.info import info
from lightning_lora.errors import shown
from lightning_lora.files import limits
from lightning_lora.files.pickle_check import check_pickle
from lightning_lora.files.safetensors import read_header
from lightning_lora.files.torch_archive import read_torch_file

SECONDS, MEGABYTES = 2.0, 200
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder that another program wrote."""
    inject(net := model(), LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    save_adapter(net, tmp_path / "adapter")
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    tensors = {f"base_model.model.0.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(tensors, tmp_path / "adapter" / TENSORS)
    return tmp_path / "adapter"


def highest_use() -> int:
    """The most memory that the process had since it was last asked to forget it, in kB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def refusal(door: Callable[[], Any]) -> str:
    """What is said; it took neither long nor much memory, beyond what was in use before."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest use so far is what is in use now
    before, started = highest_use(), time.process_time()
    with pytest.raises(LoRAError) as refused:
        door()
    assert time.process_time() - started < SECONDS
    assert highest_use() - before < MEGABYTES * 1024
    assert len(str(refused.value)) < 2000
    return str(refused.value)


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A file of torch.save, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            made.writestr(f"archive/{name}", content)
    return path


def both(path: Path) -> list[Callable[[], Any]]:
    return [lambda: load_adapter(model(), path), lambda: info(path)]


DOUBLED = b"()" + b"2\x86" * 60  # a tuple that holds another twice, which holds another twice
ORDERED, ENCODE = b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"
PICKLES: dict[str, tuple[bytes, str]] = {
    "an object of a number beyond the file": (b"]r\x00\x00\x00\x20.", "numbers an object 536870912"),
    "a tuple that doubles, as a key": (b"}(" + DOUBLED[1:] + b"K\x01u.", "parts of a pickle's keys"),
    "doubled in a set": (b"\x8f" + DOUBLED + b"\x90.", "parts of a pickle's keys"),
    "doubled in pairs": (ORDERED + b"]" + DOUBLED[1:] + b"K\x01\x86a\x85R.", "parts of a pickle's keys"),
    "a tuple of great depth, as a key": (b"}()" + b"\x85" * 500_000 + b"K\x01u.", "inside each other"),
    "a bytearray of any size": (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "of a size of its own choice"),
    "a text that doubles": (ENCODE + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "encodes text in another way"),
    "a length beyond the file": (b"\x96" + (2**33).to_bytes(8, "little") + b".", "declares 8589934592 bytes"),
    "a length below zero": (b"T\xfb\xff\xff\xff.", "declares -5 bytes"),  # back to its own first byte, for ever
    "names of many classes": (b"](" + b"ca\nb\n" * 20_000 + b"e.", "10001 names of classes and functions in a pickle"),
    "a list that grows in a key": (ORDERED + b"]q\x00\x85h\x00K\x01a0R.", "goes on growing"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickle_that_is_made_to_hurt_is_refused_before_it_is_read(tmp_path: Path, case: str):
    """Some of them would end the process, which is why they must not be tried without the limits."""
    program, said = PICKLES[case]
    pickled = b"\x80\x02" + program
    with pytest.raises(LoRAError, match=said):
        check_pickle(pickled, "file")
    path = archive(tmp_path / "a.ckpt", pickled)
    for door in both(path):
        assert said in refusal(door)
    (tmp_path / "old.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickled)
    assert said in refusal(lambda: read_torch_file(tmp_path / "old.bin"))


def test_honest_pickles_are_followed_to_their_end(tmp_path: Path):
    shared = ("a", ("b",) * 3)
    values = {"state_dict": OrderedDict(a=torch.ones(2), b=nn.Parameter(torch.ones(2).half())), "hyper_parameters": {}}
    values["hyper_parameters"] = {"bytes": b"abc\xff", "keys": {shared: [shared] * 99}, "n": -(2**70), "s": {1, 2}}
    torch.save(values, tmp_path / "a.ckpt")
    assert read_torch_file(tmp_path / "a.ckpt")["hyper_parameters"] == values["hyper_parameters"]
    for protocol in range(6):
        pickled = pickle.dumps([values["hyper_parameters"], {"x": (1.5, None, True, "é" * 300)}, [[]] * 9], protocol)
        assert check_pickle(pickled + b"more", "file") == len(pickled)


def test_old_files_of_torch_are_read(tmp_path: Path):
    torch.save({"a": torch.arange(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_torch_file(tmp_path / "old.bin")["a"].tolist() == [0, 1, 2]


def expanded(*shape: int) -> torch.Tensor:
    return torch.ones(1).expand(*shape)


@pytest.mark.parametrize("form", ["checkpoint", "state dict"])
def test_tensors_that_are_larger_than_what_is_stored_are_refused(tmp_path: Path, form: str):
    state = {"0.lora_A": expanded(2**20, 4), "0.lora_B": expanded(2**20, 2**20)}
    torch.save(state if form == "state dict" else {"state_dict": state}, tmp_path / "a.pt")
    for door in both(tmp_path / "a.pt"):
        assert "times the bytes that a file stores for its tensors" in refusal(door)


def test_many_views_of_one_tensor_are_refused_and_a_few_are_read(tmp_path: Path):
    whole = torch.ones(2**20)
    torch.save({f"a{i}": whole.view(-1) for i in range(12)}, tmp_path / "a.pt")
    assert len(read_torch_file(tmp_path / "a.pt")) == len(read_torch_file(tmp_path / "a.pt", "meta")) == 12
    torch.save({f"a{i}": whole.view(-1) for i in range(2000)}, tmp_path / "a.pt")
    assert "has 2000 times the bytes" in refusal(lambda: read_torch_file(tmp_path / "a.pt"))
    torch.save({"mask": torch.ones(1).expand(512, 512)}, tmp_path / "a.pt")
    assert read_torch_file(tmp_path / "a.pt")["mask"].shape == (512, 512)


def test_tensor_that_a_pickle_makes_without_storing_it_is_refused(tmp_path: Path):
    call = b"ctorch\nTensor\nM\x00\x40M\x00\x40\x86R"  # torch.Tensor(16384, 16384)
    path = archive(tmp_path / "a.pt", b"\x80\x02}(X\x01\x00\x00\x00a" + call + b"u.")
    assert "its tensors claim" in refusal(lambda: read_torch_file(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(tmp_path: Path, compression: int):
    tensor = torch.zeros(2**22)
    torch.save({"0.lora_A": tensor}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        records = {info.filename.partition("/")[2]: good.read(info) for info in good.infolist()}
    path = archive(tmp_path / "a.pt", records.pop("data.pkl"), compression, **records)
    assert path.stat().st_size < 100_000
    for door in both(path):
        assert "is compressed, which torch.save never does" in refusal(door)


def test_records_that_overlap_or_have_two_directories_are_refused(tmp_path: Path):
    torch.save({"0.lora_A": torch.zeros(2**18)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04" + content)  # after which every offset is another
    assert "its directory is not at its end" in refusal(lambda: read_torch_file(tmp_path / "b.pt"))
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02}.")
        made.writestr("archive/data/0", b"a" * 100)
        made.filelist.extend(made.filelist[1:] * 50)
        made._didModify = True  # type: ignore[attr-defined]
    assert "they overlap" in refusal(lambda: read_torch_file(tmp_path / "c.pt"))


def nested(value: Any, times: int, sharing: int) -> Any:
    for _ in range(times):
        value = [value] * sharing
    return value


LARGE: dict[str, Any] = {
    "a shared list": nested(1, 60, 2),
    "in a mapping": {"a": nested(1, 40, 3)},
}


def test_number_of_more_digits_than_python_writes_is_shown():
    assert shown(10**5000) in ("a number with more digits than Python writes", f"1{'0' * 5000}")  # by Python's version
    assert shown({"a": [object]}) == "{'a': [<class 'object'>]}"


@pytest.mark.parametrize("place", ["r", "rank_pattern", "target_modules", "lora_alpha", "bias", "layers_pattern"])
@pytest.mark.parametrize("case", LARGE)
def test_shared_lists_and_long_numbers_are_shown_short(tmp_path: Path, place: str, case: str):
    value = LARGE[case]
    state = {"0.lora_A": torch.ones(2, 4), "0.lora_B": torch.ones(4, 2)}
    meta = {"format_version": 1, "kind": "adapter", "config": {place: value}, "layers": [["Linear", 1.0, ["0"]]]}
    meta |= {"fingerprint": [], "network": "", "origin": {}}
    torch.save({"state_dict": state, "lora": meta}, tmp_path / "a.ckpt")
    assert "LoRAConfig: " in refusal(lambda: load_adapter(model(), tmp_path / "a.ckpt"))
    for key in ("format_version", "kind", "layers", "fingerprint", "network", "origin"):
        torch.save({"state_dict": state, "lora": meta | {"config": {}, key: value}}, tmp_path / "a.ckpt")
        for door in both(tmp_path / "a.ckpt"):
            refusal(door)


def test_json_and_headers_of_any_size_are_refused_by_their_size(tmp_path: Path, folder: Path):
    with open(folder / CONFIG, "r+b") as file:
        file.truncate(2**32)
    assert "4294967296 bytes of JSON" in refusal(lambda: load_adapter(model(), folder))
    (folder / CONFIG).write_text("[" + "[]," * 1_000_000 + "[]]")
    assert "commas and brackets in JSON" in refusal(lambda: load_adapter(model(), folder))
    with open(tmp_path / "a.safetensors", "wb") as out:
        out.write(struct.pack("<Q", 97_000_000))
        out.truncate(97_000_008)
    assert "97000000 bytes of a safetensors header" in refusal(lambda: read_header(tmp_path / "a.safetensors"))
    text = b"{" + b'"a":[],' * 600_000 + b'"b":[]}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "commas and brackets in JSON" in refusal(lambda: read_header(tmp_path / "a.safetensors"))
    (tmp_path / "base").mkdir()
    with open(tmp_path / "base" / "model.safetensors.index.json", "wb") as out:
        out.truncate(2**32)
    assert "bytes of an index" in refusal(lambda: info(tmp_path / "base"))


LONG_NAMES = {
    "characters": "a" * 10_000,
    "dots": "a." * 400 + "a",
    "only dots": "." * 999,
    "wrappers": "0" + ".base_layer" * 150,
}


@pytest.mark.parametrize("form", ["safetensors", "checkpoint", "description"])
@pytest.mark.parametrize("case", LONG_NAMES)
def test_long_and_deep_names_are_refused(tmp_path: Path, folder: Path, case: str, form: str):
    name = LONG_NAMES[case]
    tensors = {f"base_model.model.{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    if form == "safetensors":
        save_file(tensors, folder / TENSORS)
        path = folder
    else:
        own = {f"{name if form == 'checkpoint' else '0'}.lora_{x}": torch.ones(2, 2) for x in "AB"}
        meta = {"format_version": 1, "kind": "adapter", "config": {"r": 2}, "layers": [["Linear", 1.0, [name]]]}
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": own, "lora": meta | {"fingerprint": {}, "network": "", "origin": {}}}, path)
    said = refusal(lambda: load_adapter(model(), path))
    if form == "description":
        assert "is missing in the tensors or in their description" in said
    else:
        assert re.search(r"has \d+ (characters of a name|parts between dots of a name)", said)


def test_as_many_names_as_a_file_can_hold_are_read(folder: Path):
    names = [f"model.layers.{i}.q_proj" for i in range(50_000)]
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": [*names, "0"]}))
    started = time.process_time()
    assert load_adapter(model(), folder) == ["0"]
    assert time.process_time() - started < 5 * SECONDS  # a time that grows with the square would be minutes


def test_limits_of_names_are_for_their_parts_and_for_all_together(monkeypatch: pytest.MonkeyPatch):
    limits.check_names([".".join("a" * 100)], "file")
    with pytest.raises(LoRAError, match="has 101 parts between dots of a name"):
        limits.check_names([".".join("a" * 101)], "file")
    monkeypatch.setattr(limits, "NAMES_TEXT", limits.Limit(100, "characters", "of a test"))
    limits.check_names(["a.b.c"] * 6, "file")  # 3 times 5 each
    with pytest.raises(LoRAError, match="has 105 characters"):
        limits.check_names(["a.b.c"] * 7, "file")


def test_patterns_of_a_users_own_code_run_as_they_are():
    inject(net := model(), LoRAConfig(r=2, target_modules="(0+)+", rank_pattern={r"(0|1)\1?": 3}))
    assert net[0].lora_A.shape == (3, 4)
    with pytest.raises(LoRAError, match=r"target_modules: '\(+\.\.\..* is not a regular expression"):
        LoRAConfig(target_modules="(" * 5000 + ")" * 5000)


# --- the list of limits ---


def test_every_limit_is_in_the_reference_and_in_use():
    package = Path(limits.__file__).parents[1]
    page = (package / "files" / "README.md").read_text()
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "limits.py")
    for name, limit in limits.every_limit():
        row = f"| {limit.what} | {limit.most:,} | {limit.why} | `{name}` |"
        assert row in page, row
        assert re.search(rf"\b{name}\b", code) or name.startswith("NAME"), name
