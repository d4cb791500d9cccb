"""save_merged: equal to merging on one device, in a folder that is complete or not there, one tensor at a time."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    save_merged,
)
from lightning_lora.exchange import merged_folder
from lightning_lora.exchange import merged_tensors as one_by_one
from lightning_lora.files.safetensors import Writer
from lightning_lora.model.adapted_model import open_model
from lightning_lora.trainer.after_fit import refuse_merge_after_fit
from support.files.merged_folder import FILE, read
from support.models.peers import fill_, model
from support.models.pretrained import Lit
from support.ranks.processes import world
from support.ranks.sharded import DEVICE, shard_
from support.ranks.sharded_adapters import PLAN, assert_same_bits, block, injected


class Live:
    """Gathered tensors: how many there were, and the bytes alive at most."""

    def __init__(self, gather: Any) -> None:
        self.gather = gather
        self.count = self.now = self.most = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        value = self.gather(tensor)
        self.count += 1
        self.change(value.nbytes)
        self.most = max(self.most, self.now)
        weakref.finalize(value, self.change, -value.nbytes)
        return value

    def change(self, size: int) -> None:
        self.now += size


def on_one_device(kind: str) -> nn.Module:
    if "tensor parallel" in kind:
        return block()
    return injected(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)


def sharded(kind: str) -> nn.Module:
    net = on_one_device(kind)
    if kind == "tensor parallel and fsdp2":
        both = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
        return fully_shard(parallelize_module(net, both["tp"], PLAN), mesh=both["dp"])
    if kind == "offloaded":
        return shard_(net, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return shard_(net, shape=(2, 2) if kind == "two copies" else None)


KINDS = {"bfloat16": 2, "offloaded": 2, "two copies": 4, "tensor parallel and fsdp2": 4}


def write(folder: Path, kind: str) -> None:
    net = sharded(kind)
    with torch.no_grad():
        net(torch.ones(2, 6, dtype=next(net.parameters()).dtype))  # the root now shows gathered weights
    largest = max(parameter.nbytes for parameter in net.parameters())
    whole = sum(parameter.nbytes for parameter in net.parameters())
    for state, most in (("unmerged", 150), ("merged", whole)):
        if state == "merged":
            merge(net)
        one_by_one.full_tensor, gather = Live(one_by_one.full_tensor), one_by_one.full_tensor
        try:
            save_merged(net, folder / state, max_shard_bytes=most)
            live = one_by_one.full_tensor
        finally:
            one_by_one.full_tensor = gather
        assert live.count == len([name for name in net.state_dict() if "lora_" not in name])
        assert live.most == largest < whole / 2  # on the writing rank too, whatever the size of its files
        assert is_merged(net) == (state == "merged")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
def test_a_sharded_model_is_written_as_one_merged_on_one_device(tmp_path, kind):
    world(KINDS[kind]).run(write, tmp_path, kind)
    expected = merge_and_unload(on_one_device(kind))
    for state in ("unmerged", "merged"):
        assert_same_bits(read(tmp_path / state), expected.state_dict())
    assert len(list((tmp_path / "unmerged").glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob(".*"))  # nothing of the writing is left
    plain = on_one_device(kind)
    merge_and_unload(plain).load_state_dict({name: value + 1 for name, value in expected.state_dict().items()})
    plain.load_state_dict(load_file(tmp_path / "merged" / FILE))
    assert_same_bits(plain.state_dict(), expected.state_dict())


def failing(folder: Path) -> list[str]:
    net, rank, messages = shard_(injected()), dist.get_rank(), []

    def fails(name: str) -> None:
        with pytest.raises((LoRAError, OSError)) as caught:
            save_merged(net, folder / name, max_shard_bytes=300)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")

    fails("file")
    merged_folder.Writer = FullDisk
    try:
        fails("there")
    finally:
        merged_folder.Writer = Writer
    if rank == 1:
        with torch.no_grad():
            net[2].lora_B.to_local().fill_(torch.inf)
    fails("there")
    fails("new")
    return messages


class FullDisk(Writer):
    """Breaks the second file off after its first tensor."""

    written = 0

    def write(self, value: torch.Tensor) -> None:
        if self.written and "model-00002" in self.file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(value)
        self.written += 1


@pytest.mark.slow
def test_save_merged_that_fails_on_one_rank_fails_on_all(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / FILE).write_text("an earlier one")
    first, second = world().run(failing, tmp_path)
    assert "is a file" in first[0]
    assert first[1].startswith("OSError: [Errno 28] No space left on device")
    assert all(message.startswith("LoRAError: save_merged: ") for message in second[:2])
    assert all(message.startswith("NonFiniteError: save_merged: ") for message in (*first[2:], *second[2:]))
    assert all("on another rank" in message for message in (*second[:2], *first[2:]))
    assert all("'2.weight'" in message and "not finite" in message for message in second[2:])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "there"}
    assert [path.name for path in (tmp_path / "there").iterdir()] == [FILE]


# --- a LightningModule around a transformers model ---


def around_transformers() -> Lit:
    module = Lit(model=model("mixtral"))
    inject(module, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fill_(module)
    return module


def write_for_transformers(folder: Path) -> None:
    module = around_transformers()
    devices = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=devices)
    fully_shard(module, mesh=devices)
    save_merged(module, folder, max_shard_bytes=20_000)
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    with pytest.raises(LoRAError, match=r"merge_after_fit=True\).*was sharded by fully_shard"):
        refuse_merge_after_fit(trainer, open_model(module, "test"))


@pytest.mark.slow
def test_a_sharded_transformers_model_is_written_as_from_pretrained_loads_it(tmp_path):
    world(2).run(write_for_transformers, tmp_path)
    expected = merge_and_unload(around_transformers()).model
    found, info = type(expected).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_bits(found.state_dict(), expected.state_dict())
