"""Files that are damaged, or made to hurt: a clear error, nothing half loaded, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange import model, ours, quiet_peers, theirs
from plain import Zoo, bits, trace, zoo_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError, inject, load_adapter, save_adapter
from lightning_lora.header import read_header
from lightning_lora.info import info
from lightning_lora.merge_command import merge_on_disk
from lightning_lora.model_folder import is_plain_name

pytestmark = quiet_peers
CONFIG, TENSORS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 1], 8, 12)}
BAD_FILES = {
    "empty": b"",
    "short": b"\x01\x02",
    "a header longer than the file": safetensors_bytes({}, length=10**6),
    "a huge header": safetensors_bytes({}, length=2**63),
    "not JSON": safetensors_bytes(b"{nothing"),
    "a list": safetensors_bytes([1, 2]),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "truncated": safetensors_bytes(GOOD, bytes(11)),
    "too long": safetensors_bytes(GOOD, bytes(13)),
    "overlap": safetensors_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "gap": safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "wrong size": safetensors_bytes({"a": entry([3], 0, 8)}, bytes(8)),
    "negative shape": safetensors_bytes({"a": entry([-2], 0, 8)}, bytes(8)),
    "absurd shape": safetensors_bytes({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)),
    "overflowing shape": safetensors_bytes({"a": entry([2**63 - 1, 2], 0, 8)}, bytes(8)),
    "backward offsets": safetensors_bytes({"a": entry([2], 8, 0)}, bytes(8)),
    "fractional shape": safetensors_bytes({"a": entry([1.5], 0, 6)}, bytes(6)),
    "unknown dtype": safetensors_bytes({"a": entry([2], 0, 8, "F31")}, bytes(8)),
    "no offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "metadata that is not text": safetensors_bytes({"__metadata__": {"x": 1}, **GOOD}, bytes(12)),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_safetensors_file_is_refused_where_safetensors_refuses_it(tmp_path, case: str):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(LoRAError, match=r"a\.safetensors"):
        read_header(path)
    with pytest.raises((SafetensorError, RuntimeError)):
        safe_open(path, "pt")


def test_a_name_twice_is_refused(tmp_path):
    """safetensors itself takes the last one."""
    one, other = json.dumps(entry([1], 0, 4)), json.dumps(entry([1], 4, 8))
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(f'{{"a": {one}, "a": {other}}}'.encode(), bytes(8)))
    with pytest.raises(LoRAError, match="found a name twice"):
        read_header(tmp_path / "a.safetensors")


def test_a_good_header_is_read_as_safetensors_reads_it(tmp_path):
    dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    tensors = {f"t{i}": torch.zeros(i, 3).to(dtype) for i, dtype in enumerate(dtypes)} | {"scalar": torch.tensor(5)}
    save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"x": "y"}
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        found = header.entries[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[found.start : found.start + found.nbytes] == bits(tensor)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "a\\b", "C:x", "..", ".", "", "a\0", 3, None, ["a"]])
def test_names_that_leave_the_folder(name: Any):
    assert not is_plain_name(name)


NORM = "model.norm.weight"
BAD_INDEXES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "outside": ("must be in a safetensors file of this folder", lambda m: {**m, NORM: "../x.safetensors"}),
    "absolute": ("must be in a safetensors file of this folder", lambda m: {**m, NORM: "/x.safetensors"}),
    "no file": ("is not there", lambda m: {**m, NORM: "x.safetensors"}),
    "pickle": ("must be in a safetensors file", lambda m: {**m, NORM: "pytorch_model.bin"}),
    "one too many": ("should be in .* and is not there", lambda m: {**m, "x": next(iter(m.values()))}),
    "one too few": ("but the index says None", lambda m: {k: v for k, v in m.items() if k != NORM}),
    "a list": ("expected a weight_map of names and files, found list", lambda m: list(m)),
    "nothing": ("expected a weight_map", lambda m: {}),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model("llama").save_pretrained(tmp_path / "base", max_shard_size="12KB")
    ours("llama", tmp_path / "adapter")
    return tmp_path / "base"


def files_in(path: Path) -> dict[str, Any]:
    """Every path with its content or the place that it leads to."""
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


def refused(message: str, base: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    with pytest.raises(LoRAError, match=message):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_that_lies_is_refused(tmp_path, base: Path, case: str):
    message, change = BAD_INDEXES[case]
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "x.safetensors")
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))
    refused(message, base, tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, base: Path):
    one, other = sorted(base.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    save_file(load_file(other) | {name: load_file(one)[name]}, other)
    refused(f"'{name}' is in '{other.name}', but the index says '{one.name}'", base, tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{", "", '{"weight_map": 3}', "nul\0l", '{"a":' * 10_000])
def test_an_index_that_is_no_index_is_refused(tmp_path, base: Path, content: str):
    (base / INDEX).write_text(content)
    refused(r"index\.json: (expected|cannot be read)", base, tmp_path)


def test_links_that_lead_out_of_the_model_are_not_followed(tmp_path, base: Path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    for target in (secret / "key", secret):
        (base / "README.md").unlink(missing_ok=True)
        (base / "README.md").symlink_to(target)
        refused(r"README\.md: is a link to .*secret", base, tmp_path)
    (base / "README.md").unlink()
    (base / "link.json").symlink_to("config.json")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out" / "link.json").is_symlink()
    assert (tmp_path / "out" / "link.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_model_in_hugging_faces_cache_is_all_links_and_is_read(tmp_path, base: Path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(base.iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    merge_on_disk(snapshot, tmp_path / "adapter", tmp_path / "out", check=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in snapshot.iterdir()}


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, base: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / INDEX).exists()


class Harm:
    """Unpickling runs a command that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("where", ["adapter", "adapter.bin", "base", "info"])
def test_pickled_code_is_not_run(tmp_path, base: Path, where: str):
    trap = tmp_path / "harmed"
    torch.save({"state_dict": {"a.lora_A": torch.zeros(2, 2), "x": Harm(trap)}}, tmp_path / "bad.ckpt")
    if where == "adapter.bin":
        (tmp_path / "adapter" / TENSORS).unlink()
        shutil.copy(tmp_path / "bad.ckpt", tmp_path / "adapter" / "adapter_model.bin")
    doors: dict[str, Callable[[], Any]] = {
        "adapter": lambda: load_adapter(model("llama"), tmp_path / "bad.ckpt"),
        "adapter.bin": lambda: load_adapter(model("llama"), tmp_path / "adapter"),
        "base": lambda: merge_on_disk(tmp_path / "bad.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt"),
        "info": lambda: info(tmp_path / "bad.ckpt"),
    }
    with pytest.raises(LoRAError, match="objects other than plain types and tensors"):
        doors[where]()
    assert not trap.exists()


def spoiled(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of an adapter folder and keep its header."""
    with safe_open(path / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    change(tensors)
    save_file(tensors, path / TENSORS, metadata)


ROOT = "base_model.model."
A, B = f"{ROOT}conv.lora_A.weight", f"{ROOT}conv.lora_B.weight"
HEAD = f"{ROOT}head.weight"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


SPOILED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "NaN": (r"'conv\.lora_B' holds NaN or Inf", lambda t: t[B].view(-1)[3:4].fill_(float("nan"))),
    "Inf": (r"'conv\.lora_A' holds NaN or Inf", lambda t: t[A].view(-1)[3:4].fill_(float("-inf"))),
    "NaN beside": (r"'head\.weight' holds NaN", lambda t: t[HEAD].fill_(float("nan"))),
    "whole numbers": (r"'conv\.lora_A' must be a floating point tensor", lambda t: t.update({A: t[A].long()})),
    "whole numbers beside": (r"'head\.weight' must be torch\.float32", lambda t: t.update({HEAD: t[HEAD].long()})),
    "no B": (r"'conv\.lora_B' is missing", lambda t: t.pop(B)),
    "no A": (r"'conv' is missing|'conv\.lora_B' has no place|'conv\.lora_A' is missing", lambda t: t.pop(A)),
    "another rank": (r"say r=2, but .* rank 3", lambda t: t.update({A: zeros(3, 8, 3), B: zeros(8, 3, 1)})),
    "two ranks": (r"A \(3, 8, 3\) and B \(8, 2, 1\) do not share a rank", lambda t: t.update({A: zeros(3, 8, 3)})),
    "another width": (r"'conv\.lora_A' must have shape \(2, 8, 3\), but has", lambda t: t.update({A: zeros(2, 9, 3)})),
    "rank 0": (r"do not share a rank", lambda t: t.update({A: zeros(0, 8, 3), B: zeros(8, 0, 1)})),
    "a vector": (r"two dimensions or more", lambda t: t.update({A: zeros(2)})),
    "one too many": (r"'nowhere\.weight'", lambda t: t.update({f"{ROOT}nowhere.weight": zeros(2)})),
    "a layer too many": (
        r"'nowhere'",
        lambda t: t.update({f"{ROOT}nowhere.lora_A.weight": zeros(2, 3), f"{ROOT}nowhere.lora_B.weight": zeros(3, 2)}),
    ),
    "one name twice": (r"both mean 'head\.weight'", lambda t: t.update({"head.weight": zeros(3, 8)})),
    "no layer": (r"names no layer", lambda t: t.update({f"{ROOT}lora_A.weight": zeros(2, 2)})),
    "no factors": (r"no lora_A|is missing", lambda t: [t.pop(name) for name in list(t) if "lora_" in name]),
}


def zoo() -> Zoo:
    """Always with the same weights."""
    torch.manual_seed(1)
    return Zoo()


@pytest.mark.parametrize("header", ["our header", "peft's names alone"])
@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_adapter_leaves_the_model_alone(tmp_path, case: str, header: str):
    message, change = SPOILED[case]
    net = zoo()
    inject(net, zoo_config(init_lora_weights=False))
    save_adapter(net, tmp_path)
    spoiled(tmp_path, change)
    if header != "our header":
        save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
    fresh = zoo()
    before = trace(fresh)
    with pytest.raises(LoRAError, match=message):
        load_adapter(fresh, tmp_path)
    assert trace(fresh) == before


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("r", 0), ("r", -1), ("r", 2.5), ("r", "x"), ("r", True), ("r", 10**400), ("r", [8]), ("r", 3),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", 0), ("lora_alpha", "8"),
    ("lora_dropout", 1), ("lora_dropout", None), ("bias", "some"), ("bias", 3), ("use_rslora", 1),
    ("target_modules", "("), ("target_modules", 5), ("target_modules", [1]), ("target_modules", {"a": 1}),
    ("rank_pattern", [1]), ("rank_pattern", {"(": 1}), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q": "x"}),
    ("alpha_pattern", {"q_proj": float("nan")}), ("alpha_pattern", 7), ("modules_to_save", "x"), ("modules_to_save", 3),
    ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]), ("exclude_modules", 3),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_options_that_are_not_allowed(tmp_path, option: str, value: Any):
    theirs("llama", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {option: value}))
    fresh = model("llama")
    before = trace(fresh)
    if option == "lora_dropout" and value is None:
        load_adapter(fresh, tmp_path)
        return
    with pytest.raises(LoRAError, match=option if option != "r" else "r"):
        load_adapter(fresh, tmp_path)
    assert trace(fresh) == before


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"peft_type": "LORA"', "\udcff", '{"a":' * 10_000, ""])
def test_a_config_that_is_no_config(tmp_path, content: str):
    theirs("llama", tmp_path)
    (tmp_path / CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LoRAError, match=CONFIG):
        load_adapter(model("llama"), tmp_path)


DESCRIPTIONS: list[tuple[str, Any]] = [
    ("config", None), ("config", {"r": -1}), ("config", {"unknown": 1}), ("config", [1]), ("scalings", {"conv": 1}),
    ("scalings", {}), ("scalings", 3), ("kinds", {"conv": "Linear"}), ("kinds", {"conv": "Nothing"}), ("kinds", [1]),
    ("kinds", {"nowhere": "Linear"}), ("fingerprint", 3), ("fingerprint", {"norm.weight": 3}), ("network", 3),
    ("fingerprint", {"norm.weight": {"shape": [8], "dtype": "float32", "values": ["x"] * 8}}),
    ("fingerprint", {"norm.weight": {"shape": [8], "dtype": "float32", "values": [1.0]}}),
    ("fingerprint", {"norm.weight": {"shape": "8", "dtype": "float32", "values": [1.0] * 8}}),
    ("fingerprint", {"norm.weight": {"shape": [-8], "dtype": "float32", "values": [1.0] * 8}}),
    ("fingerprint", {"norm.weight": {"shape": [8], "dtype": "nn", "values": [1.0] * 8}}),
    ("origin", 3), ("origin", {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DESCRIPTIONS)))
@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_a_description_that_is_none(tmp_path, form: str, number: int):
    """Our own notes beside the tensors are read as carefully as everything else."""
    key, value = DESCRIPTIONS[number]
    net = zoo()
    inject(net, zoo_config(init_lora_weights=False))
    save_adapter(net, tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / TENSORS)
    with safe_open(tmp_path / "folder" / TENSORS, "pt") as file:
        description = json.loads(file.metadata()["lightning_lora"])
    source = tmp_path / "folder"
    if form == "folder":
        save_file(tensors, source / TENSORS, {"lightning_lora": json.dumps(description | {key: value})})
    else:
        source = tmp_path / "a.ckpt"
        meta = {"format_version": 1, "kind": "adapter", **description, key: value}
        names = {name: name.removeprefix(ROOT) for name in tensors}
        torch.save({"state_dict": {names[n]: t for n, t in tensors.items()}, "lora": meta}, source)
    fresh = zoo()
    before = trace(fresh)
    with pytest.raises(LoRAError):
        load_adapter(fresh, source)
    assert trace(fresh) == before


def test_a_half_of_a_float16_base_overflows(tmp_path):
    state = {key: value.half() for key, value in model("llama").state_dict().items()}
    state["model.layers.0.self_attn.q_proj.weight"][3, 3] = 65504
    save_file(state, tmp_path / "base.safetensors")
    net = ours("llama")
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.lora_A.fill_(100)
        net.model.layers[0].self_attn.q_proj.lora_B.fill_(100)
    save_adapter(net, tmp_path / "adapter")
    message = r"merge: 'model\.layers\.0\.self_attn\.q_proj\.weight': W \+ s .* is not finite"
    with pytest.raises(LoRAError, match=message):
        merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_quantised_base_is_refused(tmp_path):
    state = {key: value.clone() for key, value in model("llama").state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, tmp_path / "base.safetensors")
    theirs("llama", tmp_path / "adapter")
    with pytest.raises(LoRAError, match=rf"'{name}' is torch\.float8_e4m3fn; only floating point weights are merged"):
        merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "x.safetensors")
