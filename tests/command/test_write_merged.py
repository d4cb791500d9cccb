"""Results of merge: tensors are aligned, whatever the order in the base and its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.models.networks import small, write_small_adapter
from support.models.peers import call


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_small_adapter(tmp_path)


def test_merge_to_another_dtype_aligns_every_tensor(tmp_path: Path, capsys: Any, adapter: Path):
    """In what is written anew wide tensors come first, whatever the order in the base and its shards."""
    base = tmp_path / "base"
    base.mkdir()
    whole = {name: tensor.clone() for name, tensor in small().state_dict().items()} | {"odd": torch.ones(3)}
    shards = [{"bytes": torch.ones(3, dtype=torch.uint8)}, whole | {"number": torch.ones(2, dtype=torch.int32)}]
    for i, tensors in enumerate(shards):
        save_file(tensors, base / f"{i}.safetensors")
    weight_map = {name: f"{i}.safetensors" for i, tensors in enumerate(shards) for name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    call(capsys, "merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out", "--dtype=float16")
    for file in (tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        sizes = {name: tensor.itemsize for name, tensor in load_file(file).items()}
        assert {name for name, size in sizes.items() if header[name]["data_offsets"][0] % size} == set()
