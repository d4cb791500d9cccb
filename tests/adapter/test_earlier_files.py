"""Files that version 0.1.0 wrote load bit for bit, and what this version writes of the same model is the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    disable_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_and_unload,
    save_adapter,
    save_merged,
    unload,
)
from support.earlier import KINDS, OPTIONS, PART, Net, fit, state, tokens

EARLIER = Path(__file__).parent / "earlier"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(EARLIER / "expected.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name, value in found.items() if not _same(name, value, wanted[name])]
    assert not different


def _same(name: str, value: torch.Tensor, wanted: torch.Tensor) -> bool:
    """What is loaded has the same bits; outputs have the last bits of the machine that computed them."""
    if name in ("unmerged", "outputs"):
        return torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)
    return torch.equal(value, wanted)


def assert_is_the_fresh_base(model: Net) -> None:
    assert_same(dict(model.state_dict()), dict(Net().state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_each_kind_loads_bit_for_bit(kind: str, expected: dict[str, torch.Tensor]):
    model = load_from_checkpoint(Net, EARLIER / f"{kind}.ckpt")
    assert_same(state(model), expected)
    plain = dict(Net().state_dict())
    with disable_adapter(model):
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert_same({name: found[name].detach() for name in plain}, plain)
    unload(model)
    assert_is_the_fresh_base(model)


@pytest.mark.parametrize("kind", KINDS)
def test_load_adapter_takes_each_kind(kind: str, expected: dict[str, torch.Tensor]):
    load_adapter(model := Net(), EARLIER / f"{kind}.ckpt")
    assert_same(state(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_each_kind_goes_on_as_from_a_file_of_this_version(tmp_path, kind: str):
    """The file of this version is the earlier one, read and saved again: another machine trains to other last bits."""
    again = LoRACallback(save=kind, **OPTIONS)
    trainer = fit(Net(), tmp_path, again, resume=EARLIER / f"{kind}.ckpt", enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    earlier, now = (torch.load(path, weights_only=True) for path in (EARLIER / f"{kind}.ckpt", tmp_path / "now.ckpt"))
    for name, values in earlier["optimizer_states"][0]["state"].items():
        assert_same(now["optimizer_states"][0]["state"][name], values)
    ends = []
    for file in (EARLIER / f"{kind}.ckpt", tmp_path / "now.ckpt"):
        torch.manual_seed(1)
        callback = LoRACallback(save=kind, **OPTIONS)
        fit(model := Net(), tmp_path, callback, epochs=3, resume=file, enable_checkpointing=False)
        ends.append(state(model))
    assert_same(*ends)


def test_a_full_checkpoint_of_an_injected_part_loads_and_gives_the_base_back():
    model = load_from_checkpoint(Net, EARLIER / "part.ckpt")
    found, wanted = state(model), load_file(EARLIER / "part.safetensors")
    for name in ("unmerged", "outputs"):
        assert _same(name, found[name], wanted[name])
    unload(model)
    assert_is_the_fresh_base(model)
    inject((part := Net()).net, LoRAConfig(**PART))
    load_adapter(part, EARLIER / "part.ckpt")
    assert_same(state(part), wanted)


def test_the_peft_folder_loads_bit_for_bit_and_is_written_again_byte_for_byte(
    tmp_path, expected: dict[str, torch.Tensor]
):
    load_adapter(model := Net(), EARLIER / "peft")
    assert_same(state(model), expected)
    save_adapter(model, tmp_path / "peft")
    for file in (EARLIER / "peft").iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes(), file.name


def test_merged_weights_are_written_again_byte_for_byte(tmp_path):
    model = load_from_checkpoint(Net, EARLIER / "adapter.ckpt")
    save_merged(model, tmp_path / "merged")
    written = (EARLIER / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == written
    merge_and_unload(model)
    assert_same(load_file(EARLIER / "merged" / "model.safetensors"), dict(model.state_dict()))


def test_the_plain_merged_state_of_a_merged_checkpoint_is_that_of_this_version():
    earlier = torch.load(EARLIER / "merged.ckpt", weights_only=True)["state_dict"]
    (plain := Net()).load_state_dict(earlier)
    model = load_from_checkpoint(Net, EARLIER / "merged.ckpt").eval()
    merge_and_unload(model)
    assert torch.equal(plain.eval()(tokens()), model(tokens()))
