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
from support.models.peers import SMALL, close, config_of, logits, seeded, spread_
from support.runs.notices import quiet_peers

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
    [(ENDS, "two values"), (["lm_head"], "a value for one of them alone")],
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


@pytest.mark.parametrize("saved", [ENDS[:1], ENDS])
def test_ends_that_peft_trained_as_one_load(tmp_path, saved: list[str]):
    options = {"target_modules": ["q_proj"], "modules_to_save": list(saved), "ensure_weight_tying": True}
    other = by_peft(llama, tmp_path, **options)
    load_adapter(net := llama(), tmp_path)
    close(logits(net), logits(other))
    assert net.lm_head.weight is net.model.embed_tokens.weight


@pytest.mark.parametrize("saved", [ENDS[1:], ENDS])
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


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ENDS], ids=str)
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
