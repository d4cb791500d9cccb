"""save_merged: every layer and name as merged on one device, by one process or several that do not know each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAError,
    inject,
    merge_and_unload,
    save_merged,
)
from lightning_lora.exchange.merged_folder import INDEX
from support.models.networks import Zoo, randomise_, zoo_config
from support.ranks.sharded_adapters import assert_same_bits

FILE = "model.safetensors"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers reads it: one file, or an index that says which file holds a name."""
    if (folder / FILE).exists():
        assert [path.name for path in folder.glob("model*")] == [FILE]
        return load_file(folder / FILE)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    assert {path.name for path in folder.glob("model*")} == {INDEX, *places.values()}
    return {name: load_file(folder / file)[name] for name, file in places.items()}


def test_save_merged_on_one_device_writes_every_layer_and_name(tmp_path):
    """Every kind of layer, a shared module under both names, buffers; a folder that holds other things already."""
    torch.manual_seed(0)
    zoo = Zoo()
    inject(zoo, zoo_config())
    randomise_(zoo)
    model = nn.ModuleDict({"net": zoo, "again": zoo.conv})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.bin").write_text("mine")
    for most in (300, 10**6, 300):
        save_merged(model, tmp_path, max_shard_bytes=most)
        found = read(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert (tmp_path / "mine.bin").read_text() == "mine"
    assert not (tmp_path / FILE).exists()
    assert_same_bits(found, merge_and_unload(model).state_dict())
    with pytest.raises(LoRAError, match=r"save_merged: ModuleDict .*inject"):
        save_merged(model, tmp_path)
