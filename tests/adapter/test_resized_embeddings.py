"""Embeddings that were resized: PEFT stores them beside the adapter, and they come back with it."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAError, load_adapter, save_adapter, unload
from support.notices import quiet_peers
from support.peers import SMALL, close, logits, seeded, spread_

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]

ROWS = 70  # of 64


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=request.param)
    seeded(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path, seed: int) -> nn.Module:
    """Each time with other values in the new rows."""
    net = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.resize_token_embeddings(ROWS, mean_resizing=False)
    return net.eval()


def outputs(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.tensor([[1, ROWS - 1, 2, ROWS - 5]])).logits


@pytest.fixture
def by_peft(base: Path, tmp_path: Path) -> peft.PeftModel:
    net = peft.get_peft_model(resized(base, 1), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    spread_(net)
    net.save_pretrained(str(tmp_path / "adapter"))
    return net.eval()


def test_rows_that_peft_stored_come_back_and_are_stored_again(tmp_path, caplog, base: Path, by_peft):
    net = resized(base, 2)
    before = outputs(net)
    with caplog.at_level(logging.INFO, "lightning_lora"):
        load_adapter(net, tmp_path / "adapter")
    assert "model.embed_tokens.weight comes with the adapter: its last rows are not the base's" in caplog.text
    close(outputs(net), outputs(by_peft))
    save_adapter(net, tmp_path / "again")
    load_adapter(other := resized(base, 3), tmp_path / "again")
    assert torch.equal(outputs(other), outputs(net))
    read = peft.PeftModel.from_pretrained(resized(base, 4), tmp_path / "again").eval()
    close(outputs(read), outputs(by_peft))
    unload(net)
    assert torch.equal(outputs(net), before)


@pytest.mark.parametrize("base", [True], indirect=True, ids=["tied"])
def test_rows_of_an_adapted_embedding_come_back(tmp_path, base: Path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"])
    other = peft.get_peft_model(resized(base, 1), config)
    spread_(other)
    other.save_pretrained(str(tmp_path / "adapter"))
    load_adapter(net := resized(base, 2), tmp_path / "adapter")
    close(outputs(net), outputs(other.eval()))
    save_adapter(net, tmp_path / "again")
    load_adapter(again := resized(base, 3), tmp_path / "again")
    assert torch.equal(outputs(again), outputs(net))


def test_a_model_that_was_not_resized_is_refused_with_the_remedy(tmp_path, base: Path, by_peft):
    net = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    before = logits(net)
    with pytest.raises(LoRAError, match=r"has 70 rows, in the model 64.*model\.resize_token_embeddings\(70\)"):
        load_adapter(net, tmp_path / "adapter")
    assert torch.equal(logits(net), before)


def test_another_base_is_still_another_base(tmp_path, base: Path, by_peft):
    net = resized(base, 2)
    with torch.no_grad():
        net.model.embed_tokens.weight[:40].mul_(1.1)
    with pytest.raises(LoRAError, match=r"another base: values of 'model\.embed_tokens\.weight'"):
        load_adapter(net, tmp_path / "adapter")
