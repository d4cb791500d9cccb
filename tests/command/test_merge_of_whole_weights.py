"""Merging weights that an adapter holds whole beside their factors, and the reference, which computes them apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    inject,
    load_adapter,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.command import merge
from lightning_lora.command.merge import merge_on_disk
from support.files.expected_weights import merge_and_check
from support.models.peers import SMALL, close, seeded, spread_
from support.models.pretrained import classifier, of_new_rows, resized, save_body, tokens
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen"),
    pytest.mark.filterwarnings("ignore:merged 16-bit weights"),
]


def resized_llama(tied: bool, seed: int, path: Path) -> Any:
    """The folder at `path` is of the model before."""
    if not path.exists():
        config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
        seeded(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(path)
    return resized(path, seed)


@pytest.mark.slow
def test_adapted_tables_that_were_resized_are_merged_into_a_sharded_folder_as_in_memory(tmp_path):
    net = resized_llama(False, 1, tmp_path / "small")
    inject(net, LoRAConfig(r=4, target_modules=["embed_tokens", "lm_head"], bias="all"))
    spread_(net)
    save_adapter(net, tmp_path / "a")
    resized_llama(False, 2, tmp_path / "small").save_pretrained(tmp_path / "base", max_shard_size="8KB")
    merge_and_check(tmp_path / "base", tmp_path / "a", tmp_path / "o")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "o").eval()
    close(of_new_rows(found), of_new_rows(net))
    combined = combine([tmp_path / "a", tmp_path / "a"], [0.25, 0.75])
    load_adapter(both := resized_llama(False, 3, tmp_path / "small"), combined)
    close(of_new_rows(both), of_new_rows(net))


def test_a_resized_and_adapted_table_that_is_tied_is_refused(tmp_path):
    """Its update is of one end alone, which the file holds for both."""
    net = resized_llama(True, 1, tmp_path / "small")
    inject(net, LoRAConfig(r=4, target_modules=["embed_tokens"]))
    spread_(net)
    save_adapter(net, tmp_path / "a")
    resized_llama(True, 2, tmp_path / "small").save_pretrained(tmp_path / "base")
    with pytest.raises(LoRAError, match=r"'model.embed_tokens.weight' is also tied to the other end of the model"):
        merge_and_check(tmp_path / "base", tmp_path / "a", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_head_keeps_its_values_in_a_result_of_a_wider_dtype_than_the_base(tmp_path: Path):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    save_file({name: value.bfloat16() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    inject(net, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False))
    save_adapter(net, tmp_path / "adapter")
    arguments = (tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merge.merge_on_disk(*arguments, dtype=torch.float32, strict_base=False)
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["1.weight"], net[1].weight)


def nets_with_heads(base_classes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A base, and the same with another head, trained whole."""
    body = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    base, net = (nn.Sequential(copy.deepcopy(body), nn.Linear(5, classes)) for classes in (base_classes, 3))
    inject(net, LoRAConfig(r=2, target_modules=["0.0"], **options))
    net[1].requires_grad_(True)
    spread_(net)
    return base, net


@pytest.mark.parametrize(
    ("name", "classes", "dtype"),  # classes in the base
    [("base.safetensors", 2, torch.bfloat16), ("base.pt", 7, torch.bfloat16), ("base.ckpt", 7, None)],
    ids=str,
)
def test_a_new_head_of_another_shape_takes_the_place_of_the_bases(
    tmp_path, caplog, name: str, classes: int, dtype: torch.dtype | None
):
    base, net = nets_with_heads(classes, modules_to_save=["1"])
    state = base.state_dict()
    if name == "base.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": state, "epoch": 3} if name == "base.ckpt" else state, tmp_path / name)
    save_adapter(net, tmp_path / "adapter")
    out = (tmp_path / "out").with_suffix(Path(name).suffix)
    with caplog.at_level("INFO", "lightning_lora"):
        merge.merge_on_disk(tmp_path / name, tmp_path / "adapter", out, dtype=dtype)
    assert f"'1.weight' is the adapter's, (3, 5); in the base ({classes}, 5)" in caplog.text
    assert f"'1.bias' is the adapter's, (3,); in the base ({classes},)" in caplog.text
    found: Any = load_file(out) if name == "base.safetensors" else torch.load(out, weights_only=True)
    if name == "base.ckpt":
        assert found["epoch"] == 3
        found = found["state_dict"]
    expected = merged_state_dict(net)
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        assert found[each].dtype == (dtype if dtype and value.is_floating_point() else value.dtype)
        assert torch.equal(found[each], value.to(found[each].dtype)) or each == "0.0.weight"
        torch.testing.assert_close(found[each].float(), value.float(), rtol=2**-8 if dtype else 2e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (1, {"modules_to_save": ["1"]}, r"belongs to another base: values of '0\.0\.weight'"),
        (0, {}, r"'1\.bias' has shape \(7,\), in the adapter \(3,\)\. Load the model in Python"),
    ],
    ids=["another base", "a head that no option names"],
)
def test_a_head_of_another_shape_is_refused_if_it_may_be_another_models(
    tmp_path, change: float, options: dict[str, Any], said: str
):
    base, net = nets_with_heads(7, **options)
    save_adapter(net, tmp_path / "adapter")
    state = base.state_dict()
    torch.save({**state, "0.0.weight": state["0.0.weight"] + change}, tmp_path / "base.pt")
    with pytest.raises(LoRAError, match=said):
        merge.merge_on_disk(tmp_path / "base.pt", tmp_path / "adapter", tmp_path / "out.pt")


def test_a_base_without_the_trained_head_is_answered_with_how_to_make_one_that_has_it(tmp_path: Path):
    tuned = classifier(save_body(tmp_path / "base"))
    inject(tuned, LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    spread_(tuned)
    save_adapter(tuned, tmp_path / "adapter")
    with pytest.raises(LoRAError, match=r"'classifier\.\w+'.* the whole model .* as --base.* save_pretrained"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "without")
    classifier(tmp_path / "base").save_pretrained(tmp_path / "with")  # as the error says
    merge_on_disk(tmp_path / "with", tmp_path / "adapter", tmp_path / "merged")
    loaded = classifier(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = tuned.eval()(input_ids=tokens()).logits
        torch.testing.assert_close(loaded(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5)
