"""The command on adapters with magnitudes: merged weights are those of the live model, and info and diff show them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, inject, merged_state_dict
from lightning_lora.formats.peft_reading import read_folder
from lightning_lora.formats.sources import adapter_with_options
from support.files.expected_weights import check_merge_command
from support.models.networks import checkpoint
from support.models.peers import (
    TENSORS,
    Fused,
    base_folder,
    call,
    close,
    logits,
    ours,
    read_by_peft,
    seeded,
    tensors_of,
)
from support.runs.notices import quiet_peers

pytestmark = [*quiet_peers, pytest.mark.filterwarnings("ignore:merged 16-bit weights")]


def test_a_folder_is_merged_part_by_part_as_in_memory_and_by_peft(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", 100)  # a few rows at a time
    base_folder("gpt2-dora", tmp_path / "base")
    net = ours("gpt2-dora", tmp_path / "a")
    arguments = ("--base", tmp_path / "base", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    call(capsys, "merge", *arguments)
    check_merge_command(*arguments)
    expected = merged_state_dict(net)
    for key, value in tensors_of(tmp_path / "o").items():  # norms of parts have other last bits
        torch.testing.assert_close(value, expected[key], rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    merged = type(net).from_pretrained(tmp_path / "o")  # type: ignore[attr-defined]
    close(logits(merged), logits(read_by_peft("gpt2-dora", tmp_path / "a")))


def test_an_output_without_weights_keeps_none(tmp_path, capsys):
    """Its length is 0, by which nothing is divided."""
    net = seeded(Fused)
    with torch.no_grad():
        net.qkv.weight[2] = 0
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    inject(net, LoRAConfig(r=2, target_modules=["qkv"], use_dora=True))
    with torch.no_grad():
        net.qkv.lora_B[5:] = 0.3
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    files = ("--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "a.ckpt")
    call(capsys, "merge", *files, "--output", tmp_path / "o.safetensors")
    check_merge_command(*files, "--output", tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")["qkv.weight"]
    assert not found[2].any()
    torch.testing.assert_close(found, merged_state_dict(net)["qkv.weight"])


def test_info_and_diff_show_magnitudes(tmp_path, capsys):
    ours("llama-dora", tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj"
    described = json.loads(call(capsys, "info", tmp_path / "a", "--json"))
    adapter = read_folder(tmp_path / "a")
    magnitude = adapter.stored(name)["lora_magnitude"]
    assert described["layers"][name]["norm_magnitude"] == pytest.approx(float(magnitude.norm()), rel=1e-5)
    assert described["parameters"] == sum(tensor.numel() for tensor in adapter.tensors.values())
    tensors = load_file(tmp_path / "a" / TENSORS)
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    key = f"base_model.model.{name}.lora_magnitude_vector"
    with safe_open(tmp_path / "a" / TENSORS, "pt") as file:
        header = file.metadata()
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / "b" / TENSORS, header)
    found = json.loads(call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))["changes"]
    assert found[f"{name}.lora_magnitude"]["change"] == pytest.approx(len(magnitude) ** 0.5, rel=1e-5)
    assert found[name]["change"] == 0


def test_a_state_dict_without_options_says_by_its_tensors_that_it_has_magnitudes(tmp_path, capsys):
    """As loralib's files, with lora_alpha from whoever trained it."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    net = transformers.LlamaForCausalLM(config)
    torch.save(net.state_dict(), tmp_path / "base.pt")
    inject(net, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True))
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.mul_(1.1) if key.endswith("magnitude") else None
    factors = {name: value for name, value in net.state_dict().items() if "lora_" in name}
    torch.save(factors, tmp_path / "a.pt")
    arguments = ("--base", tmp_path / "base.pt", "--adapter", tmp_path / "a.pt", "--lora-alpha", 8)
    call(capsys, "merge", *arguments, "--output", tmp_path / "o.pt")
    check_merge_command(*arguments, "--output", tmp_path / "o.pt")
    expected, found = merged_state_dict(net), torch.load(tmp_path / "o.pt", weights_only=True)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=3e-7, atol=0)
    told = adapter_with_options(tmp_path / "a.pt", 8).config
    assert told is not None
    assert told.use_dora
