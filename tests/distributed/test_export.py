"""save_merged: equal to merging on one device, in files that are complete or not there, in little memory."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import randomise_
from safetensors.torch import load_file
from sharded import network
from test_fsdp import injected, same_bits, shard_
from torch import nn
from world import world

from lightning_lora import LoRAConfig, LoRAError, exact, inject, is_merged, merge, merged, merged_state_dict, unmerge
from lightning_lora.export import INDEX, save_merged


def read(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers reads it: the index says which file holds a name."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {name: load_file(folder / file)[name] for name, file in places.items()}
    assert sorted(path.name for path in folder.iterdir()) == sorted({INDEX, *places.values()})
    return found


def export(folder: Path, state: str) -> None:
    net = shard_(injected())
    net(torch.ones(2, 6))
    if state == "merged":
        merge(net)
    save_merged(net, folder, max_shard_bytes=300)
    assert is_merged(net) == (state == "merged")


@pytest.mark.parametrize("state", ["merged", "unmerged"])
def test_a_sharded_model_is_written_as_one_merged_on_one_device(tmp_path, state):
    world().run(export, tmp_path / "model", state)
    expected = merged_state_dict(injected())
    found = read(tmp_path / "model")
    same_bits({name: found[name] for name in expected}, expected)
    sizes = [path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(sizes) == 3
    plain = network()
    plain.load_state_dict(found)


def test_a_model_on_one_device(tmp_path):
    net = injected()
    tied = nn.ModuleDict({"net": net, "again": net[0]})
    save_merged(tied, tmp_path)
    same_bits(read(tmp_path), merged_state_dict(tied))


def failing(folder: Path) -> str:
    net = shard_(injected())
    with pytest.raises((LoRAError, OSError)) as caught:
        save_merged(net, folder, max_shard_bytes=300)
    with torch.no_grad():
        net[2].lora_B.to_local().fill_(torch.inf)
    with pytest.raises(LoRAError, match=r"save_merged: '2\.weight'"):
        save_merged(net, folder.parent / "other")
    assert not (folder.parent / "other" / INDEX).exists()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_first_rank_that_cannot_write_takes_the_others_along(tmp_path):
    (tmp_path / "model").write_text("a file where a folder should be")
    first, second = world().run(failing, tmp_path / "model", timeout=20)
    assert first.startswith("FileExistsError")
    assert second.startswith("LoRAError: save_merged: ")
    assert "on another rank" in second


# --- memory ---

SIZE, LAYERS = 1024, 16


def resident(name: str) -> int:
    """Bytes of this process, from the kernel: VmRSS now, VmHWM the peak since the last reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def peak(step: Any) -> int:
    """How far this process grows at most while a step runs."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would take in what the step needs
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def memory(folder: Path) -> dict[str, float]:
    merge_module_file = __import__("sys").modules["lightning_lora.merge"]
    net = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    inject(net, LoRAConfig(r=8))
    randomise_(net, 0.002)  # about 1 % of the weights' norm
    shard_(net)
    shard = sum(layer.weight.to_local().nbytes for layer in net)
    for _ in range(2):  # the first time pays for buffers of torch
        with merged(net):
            pass
        save_merged(net, folder / "warm", max_shard_bytes=shard // 4)
    factors = sum(factor.nbytes for layer in net for factor in (layer.lora_A, layer.lora_B))
    found: dict[str, float] = {"factors": factors, "shard": shard, "largest": net[0].weight.nbytes, "file": shard // 4}
    for name, budget in (("copies", merge_module_file.COPY_BUDGET), ("values", 0)):
        merge_module_file.COPY_BUDGET, before = budget, merge_module_file.COPY_BUDGET
        found[f"merge, {name}"] = peak(lambda: merge(net))
        merge_module_file.COPY_BUDGET = before
        found[f"kept, {name}"] = sum(kept.nbytes() for layer in net for kept in layer.lora_kept.values())
        found[f"unmerge, {name}"] = peak(lambda: unmerge(net))
    found["export"] = peak(lambda: save_merged(net, folder / "model", max_shard_bytes=shard // 4))
    return found


def test_memory_of_each_rank_while_merging_and_exporting(tmp_path):
    for rank, found in enumerate(world().run(memory, tmp_path)):
        print(f"rank {rank}, MB:", {name: round(size / 1e6, 1) for name, size in found.items()})
        assert found["kept, copies"] == found["shard"]
        assert found["kept, values"] < 0.1 * found["shard"]
        scratch = 8 * exact.CPU_BLOCK * 8  # a few blocks in float64
        assert found["merge, values"] < 0.1 * found["shard"] + found["factors"] + scratch
        assert found["unmerge, values"] < found["factors"] + scratch
        writes = found["file"] if rank == 0 else 0
        assert found["export"] < writes + 6 * found["largest"] < 2 * found["shard"]  # which is the whole model
