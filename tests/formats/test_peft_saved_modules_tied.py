"""modules_to_save on tied embeddings: PEFT trains copies, together or apart; here one weight is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged, save_adapter
from support.expected_weights import check_merge_command
from support.notices import quiet_peers
from support.peers import SMALL, call, close, config_of, logits, seeded, spread_

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules are"),
]

ENDS = ["embed_tokens", "lm_head"]


def llama() -> nn.Module:
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def by_peft(build: Callable[[], nn.Module], path: Path, **options: Any) -> peft.PeftModel:
    net = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=8, **options))
    spread_(net)
    net.save_pretrained(str(path))
    return net.eval()


def by_us(build: Callable[[], nn.Module], path: Path, **options: Any) -> nn.Module:
    net = build()
    inject(net, LoRAConfig(r=4, lora_alpha=8, **options))
    spread_(net)
    save_adapter(net, path)
    return net


def untied(net: nn.Module) -> nn.Module:
    """What the message says."""
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    return net


@pytest.mark.parametrize(
    ("saved", "held"),
    [(ENDS, "two values"), (["embed_tokens"], "a value for one of them alone"), (["lm_head"], "a value for one")],
)
def test_ends_that_peft_trained_apart_are_refused_and_load_exactly_once_untied(tmp_path, saved: list[str], held: str):
    other = by_peft(llama, tmp_path, target_modules=["q_proj"], modules_to_save=list(saved))
    net = llama()
    types, before = [type(module) for module in net.modules()], logits(net)
    with pytest.raises(LoRAError, match=rf"were trained apart: the adapter holds {held}.*model\.lm_head\.weight = "):
        load_adapter(net, tmp_path)
    assert [type(module) for module in net.modules()] == types
    assert torch.equal(logits(net), before)
    load_adapter(untied(net), tmp_path)
    close(logits(net), logits(other))


@pytest.mark.parametrize("saved", [ENDS[:1], ENDS[1:], ENDS])
def test_ends_that_peft_trained_as_one_load(tmp_path, saved: list[str]):
    options = {"target_modules": ["q_proj"], "modules_to_save": list(saved), "ensure_weight_tying": True}
    other = by_peft(llama, tmp_path, **options)
    load_adapter(net := llama(), tmp_path)
    close(logits(net), logits(other))
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_an_end_that_peft_does_not_know_was_trained_apart_whatever_the_option_says(tmp_path):
    options = {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}
    other = by_peft(gpt2, tmp_path, **options, ensure_weight_tying=True)
    net = gpt2()
    with pytest.raises(LoRAError, match=r"'transformer\.wte\.weight' and 'lm_head\.weight' are one tensor"):
        load_adapter(net, tmp_path)
    load_adapter(untied(net), tmp_path)
    close(logits(net), logits(other))


def test_adapters_that_peft_tied_load_with_the_same_outputs(tmp_path):
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    other = by_peft(llama, tmp_path, **options)
    load_adapter(net := llama(), tmp_path)
    close(logits(net), logits(other))


@pytest.mark.parametrize("saved", [ENDS[:1], ENDS[1:], ENDS])
def test_peft_reads_our_tied_module_and_keeps_it_tied(tmp_path, saved: list[str]):
    net = by_us(llama, tmp_path, target_modules=["q_proj"], modules_to_save=saved)
    assert config_of(tmp_path)["ensure_weight_tying"] is True
    read = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(logits(read), logits(net))
    base = read.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(net))


def test_peft_reads_our_tied_module_of_a_name_that_it_does_not_tie(tmp_path):
    net = by_us(gpt2, tmp_path, target_modules=["c_attn"], modules_to_save=["wte"])
    assert config_of(tmp_path)["modules_to_save"] == ["wte", "lm_head"]
    read = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    close(logits(read), logits(net))
    with read.disable_adapter():
        close(logits(read), logits(gpt2()))


def test_a_folder_without_tied_modules_says_nothing_of_ties(tmp_path):
    by_us(llama, tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert "ensure_weight_tying" not in config_of(tmp_path)


@pytest.mark.parametrize("writer", [by_us, by_peft])
def test_the_command_merges_a_tied_adapter(tmp_path, capsys, writer: Callable[..., nn.Module]):
    options = {"ensure_weight_tying": True} if writer is by_peft else {}
    net = writer(llama, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"], **options)
    llama().save_pretrained(tmp_path / "base")
    paths = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    call(capsys, "merge", *paths)
    check_merge_command(*paths)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    close(logits(merged), logits(net))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"], ENDS])
def test_adapters_of_tied_embeddings_come_from_peft_and_go_back(tmp_path, targets: list[str]):
    """PEFT adapts both ends with one pair of factors, and merges their product twice; here both stay factored."""
    net = by_peft(llama, tmp_path / "theirs", target_modules=targets, ensure_weight_tying=True)
    expected = logits(net)
    assert not torch.allclose(expected, logits(llama().eval()), atol=1e-2)
    ours = llama().eval()
    names = load_adapter(ours, tmp_path / "theirs")
    assert {"model.embed_tokens", "lm_head"} <= set(names)
    close(logits(ours), expected)
    with merged(ours):
        close(logits(ours), expected)
    save_adapter(ours, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()), expected)
