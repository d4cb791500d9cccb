"""The command on adapters with trained rows: merged weights are those of the live model, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged_state_dict, save_adapter
from support.files.expected_weights import check_merge_command
from support.models.networks import checkpoint
from support.models.peers import SMALL, call, fill_, refused, seeded
from support.models.token_rows import NUMBER, ROWS, Net, fill_rows_
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


def llama(tied: bool) -> Any:
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)))


def adapted(net: nn.Module, indices: Any, targets: str = "q_proj") -> nn.Module:
    inject(net, LoRAConfig(r=4, target_modules=[targets], trainable_token_indices=indices))
    return fill_(net)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_folder_of_peft_is_merged_as_peft_does(tmp_path, tied: bool, capsys):
    llama(tied).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [63, 5]}
    theirs = peft.get_peft_model(llama(tied), peft.LoraConfig(**options))
    with torch.no_grad():
        theirs.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].add_(1)
    theirs.save_pretrained(str(tmp_path / "a"))
    call(capsys, "merge", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    found = load_file(tmp_path / "o" / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], theirs.merge_and_unload().model.embed_tokens.weight)
    printed = call(capsys, "info", tmp_path / "a")
    assert "trained rows of model.embed_tokens: 5, 63\n" in printed


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_files_that_hold_both_ends_of_a_tie_are_merged_at_both(tmp_path, form: str, capsys):
    net = seeded(lambda: Net(tied=True))
    state = net.state_dict()
    base, output = tmp_path / f"base.{form}", tmp_path / f"out.{form}"
    if form == "pt":
        torch.save(state, base)
    else:
        save_file({name: value.clone() for name, value in state.items()}, base)
    adapted(net, {"emb": ROWS}, "body")
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    call(capsys, "merge", "--base", base, "--adapter", tmp_path / "a.ckpt", "--output", output)
    check_merge_command("--base", base, "--adapter", tmp_path / "a.ckpt", "--output", output)
    found = load_file(output) if form == "safetensors" else torch.load(output, weights_only=True)
    assert_same(found, merged_state_dict(net))
    assert torch.equal(found["head.weight"][list(ROWS)], net.get_parameter("emb.lora_rows").detach())
    assert found.keys() == state.keys()


def test_a_folder_of_peft_is_merged_at_both_ends_where_the_base_folder_has_both(tmp_path, capsys):
    llama(True).save_pretrained(tmp_path / "base")
    both = {name: value.clone() for name, value in llama(True).state_dict().items()}
    save_file(both, tmp_path / "base" / "model.safetensors")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [63, 5]}
    theirs = peft.get_peft_model(llama(True), peft.LoraConfig(**options))
    rows = theirs.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.add_(1)
    theirs.save_pretrained(str(tmp_path / "a"))
    call(capsys, "merge", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    found = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(found[f"{name}.weight"][[63, 5]], rows) for name in ("model.embed_tokens", "lm_head"))
    save_adapter(ours := adapted(llama(True), [5, 63]), tmp_path / "b")
    call(capsys, "merge", "--base", tmp_path / "base", "--adapter", tmp_path / "b", "--output", tmp_path / "p")
    assert_same(load_file(tmp_path / "p" / "model.safetensors"), merged_state_dict(ours))


def untied(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter."""
    net = seeded(Net)
    save_file(dict(net.state_dict()), tmp_path / "base.safetensors")
    save_adapter(adapted(net, {"emb": ROWS}, "body"), tmp_path / "a")
    return tmp_path / "base.safetensors", tmp_path / "a"


def test_other_values_in_a_table_whose_rows_are_trained_are_no_other_base(tmp_path, capsys):
    base, adapter = untied(tmp_path)
    tensors = load_file(base)
    merge = ("merge", "--base", base, "--adapter", adapter, "--overwrite", "--output", tmp_path / "o.safetensors")
    tensors["emb.weight"][list(ROWS)] = 9.0
    save_file(tensors, base)
    call(capsys, *merge)
    tensors["body.weight"][0] = 9.0
    save_file(tensors, base)
    assert "another base: values of 'body.weight'" in refused(capsys, *merge)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("emb.weight"), "'emb', of which rows were trained, has no weight there"),
        (lambda t: t.update({"emb.weight": t["emb.weight"][:9]}), "has no row 39 to replace"),
        (lambda t: t.update({"emb.weight": t["emb.weight"].int()}), "'emb.weight' is torch.int32"),
        (lambda t: t.update({"emb.weight": t["emb.weight"][:, :4]}), "rows of 'emb.weight' have 4 values, 6 here"),
    ],
)
def test_a_base_without_the_table_is_refused(tmp_path, change: Any, message: str, capsys):
    base, adapter = untied(tmp_path)
    tensors = load_file(base)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, base)
    output = tmp_path / "o.safetensors"
    arguments = ("--base", base, "--adapter", adapter, "--output", output, "--strict-base=false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lightning_lora: adapter: belongs to another base")
        assert message in refused(capsys, "merge", *arguments)
    assert not output.exists()


def test_a_resized_table_is_written_whole_with_its_rows(tmp_path, capsys):
    llama(True).save_pretrained(tmp_path / "base")

    def resized(seed: int) -> Any:
        net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net.resize_token_embeddings(70, mean_resizing=False)
        return net

    save_adapter(ours := adapted(resized(1), [3, 69]), tmp_path / "a")
    resized(2).save_pretrained(tmp_path / "larger")
    arguments = ("--base", tmp_path / "larger", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    call(capsys, "merge", *arguments)
    check_merge_command(*arguments)
    assert_same(load_file(tmp_path / "o" / "model.safetensors"), merged_state_dict(ours))


def test_a_table_that_peft_saved_with_more_rows_than_the_base_has_is_refused(tmp_path, capsys):
    """Tokens were added in training, and the base is the model from before. load_adapter says the same."""
    llama(True).save_pretrained(tmp_path / "base")
    net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    net.resize_token_embeddings(70, mean_resizing=False)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    reason = "'model.embed_tokens.weight' has 70 rows, in the model 64: one of the two was resized"
    files = ("--base", tmp_path / "base", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    for flags in ((), ("--strict-base=false",)):
        assert reason in refused(capsys, "merge", *files, *flags)
    with pytest.raises(LoRAError, match=reason.split(": ")[-1]):
        load_adapter(llama(True), tmp_path / "a")


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_rows_of_both_ends_of_a_tie_are_right_where_the_base_holds_one(tmp_path, form: str, capsys):
    llama(True).save_pretrained(tmp_path / "base")
    ours = adapted(llama(True), [5, 63])
    save_adapter(ours, tmp_path / "folder")
    torch.save(checkpoint(ours, "adapter"), tmp_path / "checkpoint")
    files = ("--base", tmp_path / "base", "--adapter", tmp_path / form, "--output", tmp_path / "o")
    call(capsys, "merge", *files)
    check_merge_command(*files)
    assert_same(load_file(tmp_path / "o" / "model.safetensors"), merged_state_dict(ours))


def test_a_bias_beside_a_tied_table_stays_as_it_is(tmp_path, capsys):
    def bert() -> Any:
        return seeded(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))

    bert().save_pretrained(tmp_path / "base")
    ours = adapted(bert(), {"word_embeddings": [5, 63]}, "query")
    torch.save(checkpoint(ours, "adapter"), tmp_path / "a.ckpt")
    files = ("--base", tmp_path / "base", "--adapter", tmp_path / "a.ckpt", "--output", tmp_path / "o")
    call(capsys, "merge", *files)
    check_merge_command(*files)
    found = load_file(tmp_path / "o" / "model.safetensors")
    assert "cls.predictions.bias" in found
    assert_same(found, merged_state_dict(ours))


def test_peft_rows_of_a_head_with_a_bias_are_refused(tmp_path, capsys):
    net = seeded(lambda: Net(bias=True))
    save_file(dict(net.state_dict()), tmp_path / "base.safetensors")
    options: dict[str, Any] = {"target_modules": ["body"], "trainable_token_indices": {"head": [1, 2]}}
    peft.get_peft_model(net, peft.LoraConfig(**options)).save_pretrained(str(tmp_path / "a"))
    arguments = ("--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "a", "--output", tmp_path / "o")
    printed = refused(capsys, "merge", *arguments[:-1], tmp_path / "o.safetensors")
    assert "'head.weight' has trained rows and a bias" in printed


def test_info_diff_and_export_know_trained_rows(tmp_path, capsys):
    _, adapter = untied(tmp_path)
    assert "trained rows of emb: 3, 4, 5, 17, 39\n" in call(capsys, "info", adapter)
    shown = json.loads(call(capsys, "info", adapter, "--json"))
    assert shown["tables"] == {"emb": {"rows": list(ROWS), "shape": [5, 6], "dtype": "float32"}}
    assert shown["parameters"] == 2 * 4 * 6 + 5 * 6
    load_adapter(trained := seeded(Net), adapter)
    torch.save(checkpoint(trained, "adapter"), tmp_path / "a.ckpt")
    call(capsys, "export", tmp_path / "a.ckpt", tmp_path / "b")
    assert json.loads(call(capsys, "diff", adapter, tmp_path / "b", "--json"))["changes"]["emb"]["change"] == 0
    load_adapter(again := seeded(Net), tmp_path / "a.ckpt")
    fill_rows_(again)
    save_adapter(again, tmp_path / "c")
    changes = json.loads(call(capsys, "diff", adapter, tmp_path / "c", "--json"))["changes"]
    assert changes["emb"]["change"] > 1
    other = seeded(Net)
    save_adapter(adapted(other, {"emb": [1, 2, 3, 4, NUMBER - 1]}, "body"), tmp_path / "d")
    changes = json.loads(call(capsys, "diff", adapter, tmp_path / "d", "--json"))["changes"]
    assert changes["emb"] == {"problem": "other rows were trained"}
