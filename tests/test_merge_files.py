"""Merging on disk: the same bits as merging in memory, in every form of base, with everything else kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from interchange import logits, model, ours, quiet_peers, theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError, load_adapter, merged_state_dict
from lightning_lora.merge_command import merge_on_disk

pytestmark = quiet_peers
CHANGED = {"llama": 6, "gpt2": 6, "mixtral": 4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors in several chunks of several blocks too."""
    if request.param == "many chunks":
        monkeypatch.setattr("lightning_lora.exact.CPU_BLOCK", 64)
        monkeypatch.setattr("lightning_lora.places.CPU_BLOCK", 64)
        monkeypatch.setattr("lightning_lora.places.CHUNK", 200)


def base_folder(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A sharded folder with files beside the weights."""
    model(name).to(dtype).save_pretrained(path, max_shard_size="12KB")  # type: ignore[operator]
    (path / "tokenizer.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("notes")
    return path


def in_memory(name: str, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    net = model(name).to(dtype)
    load_adapter(net, adapter)
    return merged_state_dict(net)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def files_of(path: Path) -> list[Path]:
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANGED)
def test_a_folder_is_merged_as_in_memory_and_keeps_the_rest(tmp_path, name: str, dtype: torch.dtype):
    base, out = base_folder(name, tmp_path / "base", dtype), tmp_path / "out"
    theirs(name, tmp_path / "adapter")
    assert merge_on_disk(base, tmp_path / "adapter", out, check=True) == []
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


@pytest.mark.parametrize("name", CHANGED)
def test_transformers_loads_the_result(tmp_path, name: str):
    base = base_folder(name, tmp_path / "base")
    peer = theirs(name, tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    loaded = type(model(name)).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(loaded), logits(peer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", CHANGED)
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


def test_the_classifier_and_biases_of_an_adapter_replace_the_bases(tmp_path):
    base = tmp_path / "base"
    model("bert").save_pretrained(base)  # type: ignore[operator]
    theirs("bert", tmp_path / "adapter", target_modules=["query", "value"])
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", check=True)
    expected = in_memory("bert", tmp_path / "adapter")
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, expected[key]), key
    assert not torch.equal(expected["classifier.weight"], load_file(base / "model.safetensors")["classifier.weight"])


def test_one_file_of_safetensors(tmp_path):
    save_file(model("convolutions").state_dict(), tmp_path / "base.safetensors", {"format": "pt", "mine": "kept"})
    ours("convolutions", tmp_path / "adapter")
    merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", check=True)
    expected = in_memory("convolutions", tmp_path / "adapter")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "mine": "kept"}


def test_every_kind_of_layer_is_merged_as_peft_names_it(tmp_path):
    """peft's names and shapes alone, without our header: attention, embedding and convolutions of each dimension."""
    save_file(model("convolutions").state_dict(), tmp_path / "base.safetensors")
    theirs("convolutions", tmp_path / "adapter")
    merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", check=True)
    expected = in_memory("convolutions", tmp_path / "adapter")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
def test_another_dtype_is_rounded_to_once(tmp_path, before: torch.dtype, dtype: torch.dtype):
    base = base_folder("llama", tmp_path / "base", before)
    net = ours("llama", tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype, check=True)
    exact = {key: value.double() for key, value in tensors_of(base).items()}
    for key, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            exact[f"{key}.weight"] += layer.lora_scaling * layer.lora_B.double() @ layer.lora_A.double()
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == dtype
        assert (tensor == exact[key].to(dtype)).double().mean() >= (0.99 if dtype != torch.float32 else 0.8), key
        torch.testing.assert_close(tensor.double(), exact[key], rtol=torch.finfo(dtype).eps, atol=1e-7)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    loaded = type(model("llama")).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert loaded.dtype == dtype


def test_values_beyond_the_range_of_another_dtype_are_an_error(tmp_path):
    base = tmp_path / "base.safetensors"
    state = model("llama").state_dict()
    state["model.norm.weight"][3] = 1e6
    save_file({key: value.clone() for key, value in state.items()}, base)
    ours("llama", tmp_path / "adapter")
    with pytest.raises(LoRAError, match=r"'model\.norm\.weight' does not fit into torch\.float16"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out.safetensors", dtype=torch.float16, strict_base=False)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base.safetensors"]


@pytest.mark.parametrize(("size", "files"), [(20_000, 5), (10**9, 1), (1, 21)])
def test_other_shards_hold_the_same(tmp_path, size: int, files: int):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "a")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "b", max_shard_bytes=size, check=True)
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) == files
    assert (tmp_path / "b" / "model.safetensors.index.json").exists() == (files > 1)
    for shard in shards:
        assert shard.stat().st_size < size + 4096 or len(load_file(shard)) == 1
    loaded = type(model("llama")).from_pretrained(tmp_path / "b").eval()  # type: ignore[attr-defined]
    other_loaded = type(model("llama")).from_pretrained(tmp_path / "a").eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded), logits(other_loaded))


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


def test_verify_finds_a_wrong_value(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from lightning_lora import merge_files

    base = base_folder("llama", tmp_path / "base", torch.bfloat16)
    ours("llama", tmp_path / "adapter")
    honest = merge_files.new_rows

    def wrong(which: str, step: float) -> Any:
        def new_rows(job: Any, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
            new = honest(job, name, rows, first).clone()
            if name == which:
                new.view(-1)[5] *= 1 + step
            return new

        return new_rows

    for which in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        monkeypatch.setattr(merge_files, "new_rows", wrong(which, 2**-6))
        with pytest.raises(LoRAError, match=f"verify: '{which}' differs from what base and adapter give"):
            merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", check=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tied", "architecture", "refused"), [(True, "x", True), (None, "XForCausalLM", True), (False, "", False)]
)
def test_a_tied_embedding_is_refused(tmp_path, tied: bool | None, architecture: str, refused: bool):
    """GPT-2's head is its embedding, of which the file holds one; the other embedding is not tied."""
    base = base_folder("gpt2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": [architecture]}
    config = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    ours("gpt2", tmp_path / "adapter", target_modules=["wpe", "c_attn"])
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "good", check=True)
    ours("gpt2", tmp_path / "tied", target_modules=["wte"])
    if refused:
        with pytest.raises(LoRAError, match=r"'transformer\.wte\.weight' is also tied to the other end"):
            merge_on_disk(base, tmp_path / "tied", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        merge_on_disk(base, tmp_path / "tied", tmp_path / "out", check=True)


@pytest.mark.parametrize("flag", [None, True, False])
def test_gpt2s_square_weights_are_turned_as_the_adapter_says(tmp_path, flag: bool | None):
    """attn.c_proj is square: only fan_in_fan_out, or a record of our own, tells which way it is stored."""
    base = base_folder("gpt2", tmp_path / "base")
    if flag is None:
        ours("gpt2", tmp_path / "adapter")
    else:
        theirs("gpt2", tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": flag}))
    if flag is False:
        with pytest.raises(LoRAError, match=r"'transformer\.h\.0\.attn\.c_proj' is square.*contradicted by"):
            merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    else:
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", check=True)
        expected = in_memory("gpt2", tmp_path / "adapter")
        assert all(torch.equal(expected[key], value) for key, value in tensors_of(tmp_path / "out").items())


def test_another_base_is_refused_by_name(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    shard = next(p for p in base.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(p))
    state = load_file(shard)
    state["model.layers.1.mlp.up_proj.weight"] *= 1.05
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(LoRAError, match=r"another base: values of 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    with pytest.warns(UserWarning, match="another base"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out", strict_base=False)


def test_places_that_cannot_be_written_to(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "run" / "adapter")
    adapter = tmp_path / "run" / "adapter"
    for output in (base, base / "in", tmp_path, tmp_path / "run", adapter / "x"):
        with pytest.raises(LoRAError, match="write somewhere else"):
            merge_on_disk(base, adapter, output, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(LoRAError, match="exists; choose another output, or pass --overwrite"):
        merge_on_disk(base, adapter, tmp_path / "photos")
    with pytest.raises(LoRAError, match="no earlier result, and is not replaced"):
        merge_on_disk(base, adapter, tmp_path / "photos", overwrite=True)
    merge_on_disk(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("x")
    merge_on_disk(base, adapter, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "photos", "run"]
