"""Merging on disk: the same bits as merging in memory, in every form of base, with everything else kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError
from lightning_lora.command.merge import merge_on_disk
from support.files.expected_weights import merge_and_check
from support.models.peers import base_folder, in_memory, model, ours, tensors_of, theirs
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

CHANGED = {"llama": 6, "gpt2": 6, "mixtral": 4}


def files_of(path: Path) -> list[Path]:
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "dtype", "chunk"),
    [("llama", torch.bfloat16, 64), ("gpt2", torch.float32, 2**17), ("mixtral", torch.float16, 64)],
)
def test_a_folder_is_merged_as_in_memory_and_keeps_the_rest(
    tmp_path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, chunk: int
):
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", chunk)
    base, out = base_folder(name, tmp_path / "base", dtype), tmp_path / "out"
    theirs(name, tmp_path / "adapter")
    assert merge_and_check(base, tmp_path / "adapter", out) == []
    before, after = tensors_of(base), tensors_of(out)
    expected = in_memory(name, tmp_path / "adapter", dtype)
    for key, tensor in after.items():
        assert torch.equal(tensor, expected.get(key, before[key])), key  # experts have other names in the file
    assert sum(not torch.equal(tensor, before[key]) for key, tensor in after.items()) == CHANGED[name]
    assert files_of(base) == files_of(out)
    assert sum(file.suffix == ".safetensors" for file in files_of(base)) > 2
    for file in files_of(base):
        content = (base / file).read_bytes()
        kept = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        assert (out / file).read_bytes()[:kept] == content[:kept]


@pytest.mark.parametrize(("name", "narrow"), [("llama", True), ("gpt2", True), ("gpt2", False)])
def test_pefts_merge_differs_only_where_it_rounds_twice(tmp_path, name: str, narrow: bool):
    """With factors in bfloat16 peft rounds the delta, then the sum; with wide ones the two merges are the same."""
    base = base_folder(name, tmp_path / "base", torch.bfloat16)
    other = theirs(name)
    for key, parameter in other.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.bfloat16().float()
    other.save_pretrained(tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    after, exact = tensors_of(tmp_path / "out"), {k: v.double() for k, v in tensors_of(base).items()}
    peer = model(name).bfloat16()
    other = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", autocast_adapter_dtype=not narrow)
    for key, layer in other.base_model.model.named_modules():
        if f"{key}.weight" in exact and hasattr(layer, "lora_A"):
            a, b = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
            delta = layer.scaling["default"] * b @ a
            exact[f"{key}.weight"] += delta.T if name == "gpt2" else delta
    merged = {key: value for key, value in other.merge_and_unload().state_dict().items() if key in after}
    assert len(merged) >= CHANGED[name]
    differing = 0
    for key, value in merged.items():
        differs = value != after[key]
        closer = (after[key].double() - exact[key]).abs() <= (value.double() - exact[key]).abs()
        assert closer[differs].all(), key
        torch.testing.assert_close(value, after[key], rtol=2**-7, atol=2**-9)  # one step
        differing += int(differs.sum())
    assert (differing > 0) == narrow


@pytest.mark.parametrize("name", ["bert", "convolutions"])
def test_one_file_is_merged_by_pefts_names_and_keeps_its_metadata(tmp_path, name: str):
    """Without our header: attention, embedding and convolutions of each dimension, a classifier and biases."""
    save_file(before := model(name).state_dict(), tmp_path / "base.safetensors", {"format": "pt", "mine": "kept"})
    theirs(name, tmp_path / "adapter")
    merge_and_check(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    expected = in_memory(name, tmp_path / "adapter")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert name != "bert" or not torch.equal(found["classifier.weight"], before["classifier.weight"])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "mine": "kept"}


@pytest.mark.parametrize(
    ("before", "dtype"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float64),
    ],
)
def test_merge_into_another_dtype_rounds_once(tmp_path, before: torch.dtype, dtype: torch.dtype):
    """In which order a processor sums in float64 decides on last bits there, so that values are compared by ulps."""
    base = base_folder("llama", tmp_path / "base", before)
    net = ours("llama", tmp_path / "adapter")
    merge_and_check(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    exact = {key: value.double() for key, value in tensors_of(base).items()}
    terms = {key: value.abs() for key, value in exact.items()}  # a sum cannot be closer than its terms
    for key, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            a, b, scaling = layer.lora_A.double(), layer.lora_B.double(), layer.lora.spec.scaling
            exact[f"{key}.weight"] += scaling * b @ a
            terms[f"{key}.weight"] = terms[f"{key}.weight"] + scaling * b.abs() @ a.abs()
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == dtype
        if dtype == torch.float64:
            assert ((tensor - exact[key]).abs() <= 4 * torch.finfo(dtype).eps * terms[key]).all(), key
        else:
            assert (tensor == exact[key].to(dtype)).double().mean() >= (0.99 if dtype != torch.float32 else 0.8), key
            torch.testing.assert_close(tensor.double(), exact[key], rtol=torch.finfo(dtype).eps, atol=1e-7)
    name = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype" if "dtype" in config else "torch_dtype"] == name  # as the transformers that wrote it names it
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    loaded = type(model("llama")).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert loaded.dtype == dtype


def test_merge_into_another_dtype_names_it_in_every_part_of_the_config(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"text_config": {"torch_dtype": "float32", "kept": "float32"}, "vision": {"deep": {"dtype": "float16"}}}
    (base / "config.json").write_text(json.dumps(config))
    ours("llama", tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"torch_dtype": "bfloat16", "kept": "float32"}
    assert written["vision"] == {"deep": {"dtype": "bfloat16"}}


def test_unmerged_weights_in_other_files_are_left_out(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "sub/consolidated.00.pth", "model.gguf"):
        (base / name).write_bytes(b"weights")
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_text("x")
    ours("llama", tmp_path / "adapter")
    left_out = merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert {str(path) for path in left_out} == {
        "consolidated.safetensors",
        "pytorch_model.bin",
        "sub/consolidated.00.pth",
        "model.gguf",
    }
    assert not any((tmp_path / "out" / path).exists() for path in [*left_out, ".git"])
    assert (tmp_path / "out" / "sub" / "notes.txt").exists()


def test_an_output_that_exists_is_not_replaced_unless_that_is_asked_for(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(LoRAError, match="overwrite"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", overwrite=True)


def test_the_reference_finds_a_wrong_value_in_a_merged_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from lightning_lora.command import write_merged

    base = base_folder("llama", tmp_path / "base", torch.bfloat16)
    ours("llama", tmp_path / "adapter")
    honest = write_merged.result_tensor

    def wrong(which: str, step: float) -> Any:
        def merged(job: Any, name: str) -> torch.Tensor:
            new = honest(job, name).clone()
            if name == which:
                new.view(-1)[5] *= 1 + step
            return new

        return merged

    for which in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        monkeypatch.setattr(write_merged, "result_tensor", wrong(which, 2**-6))
        with pytest.raises(AssertionError, match=f"'{which}' differs from what base and adapter give"):
            merge_and_check(base, tmp_path / "adapter", tmp_path / "out", overwrite=True)
