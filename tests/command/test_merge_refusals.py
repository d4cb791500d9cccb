"""Merges on disk that are refused: tied weights, other bases, weights of unknown direction, outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.command.merge import merge_on_disk
from support.files.expected_weights import merge_and_check
from support.models.peers import SMALL, base_folder, edit, fill_, in_memory, model, ours, seeded, tensors_of, theirs
from support.models.pretrained import llava
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


def base_and_adapter(path: Path, build: Callable[[], Any], **options: Any) -> Any:
    """Save a model, adapt it, save the adapter, and return the adapted model."""
    network = seeded(build)
    network.save_pretrained(path / "base")
    inject(network, LoRAConfig(r=2, **{"target_modules": "all-linear"} | options))
    fill_(network)
    save_adapter(network, path / "adapter")
    return network


def assert_loads_as(folder: Path, network: Any) -> None:
    """Check that from_pretrained gives the merged model and misses no tensor."""
    loaded, report = type(network).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    found, expected = loaded.state_dict(), merged_state_dict(network)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_values_beyond_the_range_of_another_dtype_are_an_error(tmp_path):
    base = tmp_path / "base.safetensors"
    state = model("llama").state_dict()
    state["model.norm.weight"][3] = 1e6
    save_file({key: value.clone() for key, value in state.items()}, base)
    ours("llama", tmp_path / "adapter")
    with pytest.raises(LoRAError, match=r"'model\.norm\.weight' does not fit into torch\.float16"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "out.safetensors", dtype=torch.float16, strict_base=False)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base.safetensors"]


@pytest.mark.parametrize(
    ("tied", "architecture", "refused"), [(True, "x", True), (None, "XForCausalLM", True), (False, "", False)]
)
def test_merge_into_a_tied_embedding_is_refused_in_a_folder(
    tmp_path, tied: bool | None, architecture: str, refused: bool
):
    """GPT-2's head is its embedding, of which the file holds one; the other embedding is not tied."""
    base = base_folder("gpt2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": [architecture]}
    config = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    ours("gpt2", tmp_path / "adapter", target_modules=["wpe", "c_attn"])
    merge_and_check(base, tmp_path / "adapter", tmp_path / "good")
    ours("gpt2", tmp_path / "tied", target_modules=["wte"])
    if refused:
        with pytest.raises(LoRAError, match=r"'transformer\.wte\.weight' is also tied to the other end"):
            merge_on_disk(base, tmp_path / "tied", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        merge_and_check(base, tmp_path / "tied", tmp_path / "out")


def square_gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def test_only_the_embedding_is_tied_in_a_model_as_wide_as_its_vocabulary(tmp_path):
    network = base_and_adapter(tmp_path, square_gpt2, modules_to_save=["ln_f"])
    merge_and_check(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)
    base_and_adapter(tmp_path / "tied", square_gpt2, target_modules=["wte"])
    with pytest.raises(LoRAError, match=r"wte\.weight' is also tied to the other end"):
        merge_on_disk(tmp_path / "tied" / "base", tmp_path / "tied" / "adapter", tmp_path / "none")


def test_gpt2s_square_weights_are_turned_as_the_adapter_says(tmp_path):
    """attn.c_proj is square: only fan_in_fan_out, or a record of our own, tells which way it is stored."""
    base = base_folder("gpt2", tmp_path / "base")
    theirs("gpt2", tmp_path / "theirs")
    edit(tmp_path / "theirs", fan_in_fan_out=False)
    with pytest.raises(LoRAError, match=r"'transformer\.h\.0\.attn\.c_proj' is square.*contradicted by"):
        merge_on_disk(base, tmp_path / "theirs", tmp_path / "out")
    ours("gpt2", tmp_path / "adapter")
    merge_and_check(base, tmp_path / "adapter", tmp_path / "out")
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


def test_the_name_of_a_file_for_a_folder_is_refused(tmp_path):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    for name in ("merged.safetensors", "merged.bin", "merged.pt", "merged.ckpt"):
        with pytest.raises(LoRAError, match=rf"'{name}' is the name of a file; give a folder's name, as 'merged'"):
            merge_on_disk(base, tmp_path / "adapter", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged-1.5")
    assert list((tmp_path / "merged-1.5").glob("*.safetensors"))


@pytest.mark.transformers_5  # older ones have the names of the files in memory
def test_names_in_files_that_differ_from_those_in_memory_are_an_error_whose_calls_in_python_do_the_merge(tmp_path):
    network = base_and_adapter(tmp_path, llava, target_modules=["q_proj"])
    with pytest.raises(LoRAError, match="under exactly one prefix") as caught:
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    exec(str(caught.value).partition("In Python: ")[2], {})
    assert_loads_as(tmp_path / "merged", network)


def test_a_head_trained_around_a_transformers_model_is_in_the_calls_that_do_the_merge(tmp_path):
    torch.manual_seed(0)
    body = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, pad_token_id=0))
    body.save_pretrained(tmp_path / "base")
    module = L.LightningModule()
    module.backbone, module.head = body.model, torch.nn.Linear(16, 3)
    inject(module, LoRAConfig(r=2, target_modules=["q_proj", "head"]))
    fill_(module)
    save_adapter(module, tmp_path / "adapter")
    with pytest.raises(LoRAError, match="under exactly one prefix") as caught:
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    calls = str(caught.value).partition("weights of --base: ")[2]
    expected = {name: value.clone() for name, value in merged_state_dict(module).items()}
    exec(calls, {"model": module, "load_adapter": load_adapter, "merge_and_unload": merge_and_unload})
    found = transformers.LlamaModel.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, expected[f"backbone.{name}"]) for name, value in found.items())
