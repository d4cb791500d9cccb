"""save_merged: every layer and name as merged on one device, by one process or several that do not know each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAError,
    inject,
    load_adapter,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
)
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.exchange.merged_folder import INDEX
from support.models import Zoo, randomise_, zoo_config
from support.processes import world
from support.sharded import network
from support.sharded_adapters import assert_same_bits, injected

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


def at_once(folder: Path) -> None:
    net = injected()
    for time in range(20):
        dist.barrier()
        save_merged(net, folder / "merged" / str(time), max_shard_bytes=300)
        save_adapter(net, folder / "adapter" / str(time))


@pytest.mark.slow
def test_processes_that_each_write_the_same_do_not_disturb_each_other(tmp_path):
    """As under DDP, where every rank has the whole model and runs the whole program."""
    world().run(at_once, tmp_path)
    net = injected()
    for kind in ("merged", "adapter"):
        assert {path.name for path in (tmp_path / kind).iterdir()} == set(map(str, range(20)))
    for time in range(20):
        again = network()
        load_adapter(again, tmp_path / "adapter" / str(time))
        assert_same_bits(again.state_dict(), net.state_dict())
        assert_same_bits(read(tmp_path / "merged" / str(time)), merged_state_dict(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_merged_equals_the_command_and_a_merged_checkpoint(tmp_path, dtype):
    net, base = injected(dtype=dtype), network().to(dtype)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(base.state_dict(), tmp_path / "base" / FILE)
    save_adapter(net, tmp_path / "adapter")
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "by the command")
    save_merged(net, tmp_path / "merged")
    assert_same_bits(read(tmp_path / "merged"), read(tmp_path / "by the command"))
    assert_same_bits(read(tmp_path / "merged"), merged_state_dict(net))  # which is what the callback saves
