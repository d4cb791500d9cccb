"""Merges on disk that are refused: tied weights, other bases, weights of unknown direction, outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError
from lightning_lora.command.merge import merge_on_disk
from support.expected_weights import merge_and_check
from support.notices import quiet_peers
from support.peers import SMALL, base_folder, in_memory, model, ours, tensors_of, theirs
from support.pretrained import assert_loads_as, base_and_adapter

pytestmark = quiet_peers


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


def square_llama() -> Any:
    size = SMALL | {"vocab_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, tie_word_embeddings=True, pad_token_id=0))


@pytest.mark.parametrize(("build", "norm"), [(square_gpt2, "ln_f"), (square_llama, "norm")])
def test_only_the_embedding_is_tied_in_a_model_as_wide_as_its_vocabulary(tmp_path, build: Callable[[], Any], norm: str):
    network = base_and_adapter(tmp_path, build, modules_to_save=[norm])
    merge_and_check(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)
    table = {"ln_f": "wte", "norm": "embed_tokens"}[norm]
    base_and_adapter(tmp_path / "tied", build, target_modules=[table])
    with pytest.raises(LoRAError, match=rf"{table}\.weight' is also tied to the other end"):
        merge_on_disk(tmp_path / "tied" / "base", tmp_path / "tied" / "adapter", tmp_path / "none")


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


def test_merge_refuses_outputs_inside_base_or_adapter_and_keeps_foreign_files(tmp_path):
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
    merge_on_disk(base, adapter, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "x"
    merge_on_disk(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    merge_on_disk(base, adapter, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "photos", "run"]
