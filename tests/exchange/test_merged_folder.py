"""save_merged: every layer and name as merged on one device, by one process or several that do not know each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAError,
    inject,
    merge_and_unload,
    save_merged,
)
from support.files.merged_folder import FILE, read
from support.models.networks import Zoo, randomise_, zoo_config
from support.ranks.sharded_adapters import assert_same_bits

pytestmark = pytest.mark.core


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
