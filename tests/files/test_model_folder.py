"""Damaged and malicious bases: headers and indexes that lie, links that lead out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError, save_adapter
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.files.model_folder import is_plain_name
from support.files.expected_weights import merge_and_check
from support.models.peers import model, ours, theirs
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


CONFIG, TENSORS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"


def test_file_name_that_leaves_the_folder_is_not_plain():
    names = ["../x", "/etc/x", "a/b", "a\\b", "C:x", "..", ".", "", "a\0", 3, None, ["a"]]
    assert [name for name in names if is_plain_name(name)] == []


NORM = "model.norm.weight"


BAD_INDEXES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "outside": ("must be in a safetensors file of this folder", lambda m: {**m, NORM: "../x.safetensors"}),
    "no file": ("is not there", lambda m: {**m, NORM: "x.safetensors"}),
    "pickle": ("must be in a safetensors file", lambda m: {**m, NORM: "pytorch_model.bin"}),
    "one too many": ("should be in .* and is not there", lambda m: {**m, "x": next(iter(m.values()))}),
    "one too few": ("but the index says None", lambda m: {k: v for k, v in m.items() if k != NORM}),
    "a list": ("expected a weight_map of names and files, found list", lambda m: list(m)),
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
def test_index_that_contradicts_its_shards_is_refused(tmp_path, base: Path, case: str):
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


@pytest.mark.parametrize("content", ["[1]", "", '{"a":' * 10_000])
def test_index_that_is_not_a_json_object_is_refused(tmp_path, base: Path, content: str):
    (base / INDEX).write_text(content)
    refused(r"index\.json: (expected|cannot be read)", base, tmp_path)


def test_a_model_in_hugging_faces_cache_is_all_links_and_is_read(tmp_path, base: Path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(base.iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    merge_and_check(snapshot, tmp_path / "adapter", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in snapshot.iterdir()}


def test_merge_that_overflows_a_float16_base_is_refused_by_name(tmp_path):
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


def test_a_quantized_base_is_refused(tmp_path):
    state = {key: value.clone() for key, value in model("llama").state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, tmp_path / "base.safetensors")
    theirs("llama", tmp_path / "adapter")
    with pytest.raises(LoRAError, match=rf"'{name}' is torch\.float8_e4m3fn; only floating point weights are merged"):
        merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "x.safetensors")
