"""Merging into checkpoints and state dicts that torch.save wrote: the weights change, all else stays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged_state_dict, save_adapter
from lightning_lora.command.merge import merge_on_disk
from support.files.expected_weights import merge_and_check
from support.models.networks import checkpoint
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Net, assert_same_tensors, fit_model, make_trainer, outputs
from support.runs.with_callback import TARGETS, lora, run


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """Lightning's own checkpoint of a plain fit, with optimizer states, loops and hyperparameters."""
    fit_model(tmp_path / "pretraining", Net(width=8), saved=tmp_path / "base.ckpt", max_epochs=2)
    return tmp_path / "base.ckpt"


@pytest.fixture
def adapter(tmp_path: Path, pretrained: Path) -> Path:
    """An adapter checkpoint, trained on that base."""
    net = Net.load_from_checkpoint(pretrained, **PLAIN_TYPES_ONLY)
    trainer = make_trainer(tmp_path / "fit", lora(r=2, modules_to_save=["body.1"], bias="lora_only"))
    run(trainer, "fit", net)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return tmp_path / "adapter.ckpt"


@pytest.fixture
def plain_adapter(tmp_path: Path) -> Path:
    """An adapter for Net as it is built."""
    net = Net()
    inject(net, LoRAConfig(r=2, init_lora_weights=False, target_modules=TARGETS))
    save_adapter(net, tmp_path / "plain")
    return tmp_path / "plain"


def in_memory(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    net = Net.load_from_checkpoint(base, **PLAIN_TYPES_ONLY)
    load_adapter(net, adapter)
    return merged_state_dict(net)


@pytest.mark.slow
def test_a_lightning_checkpoint_is_merged_and_all_else_in_it_stays(tmp_path, pretrained: Path, adapter: Path):
    out = tmp_path / "out.ckpt"
    merge_and_check(pretrained, adapter, out)
    before, after = (torch.load(path, weights_only=True) for path in (pretrained, out))
    state, expected = after.pop("state_dict"), in_memory(pretrained, adapter)
    assert_same_tensors(dict(state), expected)
    assert any(not torch.equal(state[name], before["state_dict"][name]) for name in state)
    before.pop("state_dict")
    assert_same_tensors(after, before)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None  # every check sum is right
    plain = Net.load_from_checkpoint(out, **PLAIN_TYPES_ONLY)
    adapted = Net.load_from_checkpoint(pretrained, **PLAIN_TYPES_ONLY)
    load_adapter(adapted, adapter)
    torch.testing.assert_close(outputs(plain), outputs(adapted), rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob(".*"))
    merge_and_check(pretrained, adapter, tmp_path / "narrow.ckpt", dtype=torch.bfloat16)
    narrow = torch.load(tmp_path / "narrow.ckpt", weights_only=True)
    for name, tensor in narrow.pop("state_dict").items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.bfloat16)
        torch.testing.assert_close(tensor.to(expected[name].dtype), expected[name], rtol=2**-8, atol=1e-6)
    assert_same_tensors(narrow, before)


@pytest.mark.parametrize("form", ["merged", "full"])
def test_merge_into_a_state_dict_takes_an_adapter_beside_whole_weights(tmp_path, form: str):
    base = Net()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    trainer = make_trainer(tmp_path / "fit", lora(r=2, save=form))
    run(trainer, "fit", base)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    merge_and_check(tmp_path / "base.pt", tmp_path / "adapter.ckpt", tmp_path / "out.pt")
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), merged_state_dict(base))


@pytest.mark.slow
def test_a_checkpoint_of_merged_weights_is_no_base_and_its_state_dict_is_one(tmp_path):
    """Its own adapter would be in the result, and load_from_checkpoint would load that in place of the other."""
    trainer = make_trainer(tmp_path / "fit", lora(r=2, save="merged"))
    run(trainer, "fit", Net())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = Net.load_from_checkpoint(tmp_path / "first.ckpt", **PLAIN_TYPES_ONLY)
    inject(second, LoRAConfig(r=2, init_lora_weights=False, target_modules=TARGETS))
    save_adapter(second, tmp_path / "second")
    with pytest.raises(LoRAError, match="checkpoint of merged weights that also holds their adapter"):
        merge_on_disk(tmp_path / "first.ckpt", tmp_path / "second", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    torch.save(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"], tmp_path / "base.pt")
    merge_and_check(tmp_path / "base.pt", tmp_path / "second", tmp_path / "out.pt")
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), merged_state_dict(second))


class Network(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def test_the_prefix_of_the_base_is_found(tmp_path):
    lit = Network()
    torch.save({"state_dict": lit.state_dict(), "epoch": 3}, tmp_path / "lit.ckpt")
    torch.save(lit.network.state_dict(), tmp_path / "plain.pth")
    inject(lit, LoRAConfig(r=2, init_lora_weights=False, target_modules=["network.0", "network.2"]))
    save_adapter(lit, tmp_path / "folder")
    merge_and_check(tmp_path / "lit.ckpt", tmp_path / "folder", tmp_path / "a.ckpt")
    merge_and_check(tmp_path / "plain.pth", tmp_path / "folder", tmp_path / "b.pth")
    expected = merged_state_dict(lit)
    assert_same_tensors(torch.load(tmp_path / "a.ckpt", weights_only=True), {"state_dict": expected, "epoch": 3})
    bare = {name.removeprefix("network."): tensor for name, tensor in expected.items()}
    assert_same_tensors(torch.load(tmp_path / "b.pth", weights_only=True), bare)


def state_with(**tensors: Any) -> dict[str, torch.Tensor]:
    return Net().state_dict() | tensors


def test_tied_names_stay_tied(tmp_path, plain_adapter: Path):
    shared = torch.randn(4, 4)
    state = state_with(**{"tied.a": shared, "tied.b": shared, "tied.part": shared[1:3]})
    torch.save(state, tmp_path / "base.pt")
    for dtype in (None, torch.float64):
        merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt", dtype=dtype, overwrite=True)
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found["tied.a"].data_ptr() == found["tied.b"].data_ptr()
        assert torch.equal(found["tied.a"].float(), shared)
        assert torch.equal(found["tied.part"].float(), shared[1:3])


def test_merge_into_a_tied_weight_is_refused(tmp_path, plain_adapter: Path):
    owner = f"{TARGETS[0]}.weight"
    weight = Net().state_dict()[owner]
    for other in (weight, weight[1:3], weight.view(-1)):
        torch.save(state_with(**{owner: weight, "other": other}), tmp_path / "base.pt")
        with pytest.raises(LoRAError, match=rf"'{owner}' is also 'other', so changing it would change that too"):
            merge_on_disk(tmp_path / "base.pt", plain_adapter, tmp_path / "out.pt")
        assert not (tmp_path / "out.pt").exists()


def buffered(path: Path, **buffers: torch.Tensor) -> nn.ModuleDict:
    """An adapted model with buffers, whose base is at path/base.pt."""
    net = nn.ModuleDict({"body": nn.Linear(3, 3)})
    for name, value in buffers.items():
        net.register_buffer(name, value)
    torch.save(net.state_dict(), path / "base.pt")
    inject(net, LoRAConfig(r=1, init_lora_weights=False))
    return net


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_numbers_and_masks_of_an_adapter_are_written_and_other_infinities_refused(tmp_path, dtype: torch.dtype | None):
    """A temperature, which training may change, and nn.Transformer's causal mask: no run has diverged."""
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    net = buffered(tmp_path, temperature=torch.tensor(0.5), mask=mask.clone())
    net.temperature.fill_(0.25)
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    merge_and_check(tmp_path / "base.pt", tmp_path / "a.ckpt", tmp_path / "out.pt", dtype=dtype)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["temperature"] == 0.25
    assert torch.equal(found["mask"].float(), mask)
    net.mask[0, 0] = float("nan")
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    with pytest.raises(LoRAError, match="'mask' holds NaN or Inf"):
        merge_on_disk(tmp_path / "base.pt", tmp_path / "a.ckpt", tmp_path / "other.pt", dtype=dtype)
