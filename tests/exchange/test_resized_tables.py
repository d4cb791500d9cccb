"""Embeddings that were resized: PEFT stores them beside the adapter, and they come back with it."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
import transformers

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    unload,
)
from support.models.peers import SMALL, close, fill_, seeded, spread_
from support.models.pretrained import of_new_rows, resized
from support.runs.notices import quiet_peers
from support.runs.training import make_trainer

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]


each_tie = pytest.mark.parametrize("base", [False, True], indirect=True, ids=["untied", "tied"])


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=getattr(request, "param", True))
    seeded(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "targets"),
    [(True, ["q_proj", "embed_tokens"]), (False, ["q_proj"])],  # PEFT stores no untied head beside an adapted table
    indirect=["base"],
    ids=["tied, adapted", "untied"],
)
def test_rows_that_peft_stored_come_back_and_are_stored_again(tmp_path, caplog, base: Path, targets: list[str]):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    other = peft.get_peft_model(resized(base, 1), config)
    spread_(other)
    other.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(LoRAError, match=r"has 70 rows, in the model 64.*model\.resize_token_embeddings\(70\)"):
        load_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    net = resized(base, 2)
    before = of_new_rows(net)
    with caplog.at_level(logging.INFO, "lightning_lora"):
        load_adapter(net, tmp_path / "adapter")
    assert "model.embed_tokens.weight comes with the adapter: its last rows are not the base's" in caplog.text
    close(of_new_rows(net), of_new_rows(other.eval()))
    save_adapter(net, tmp_path / "again")
    load_adapter(again := resized(base, 3), tmp_path / "again")
    assert torch.equal(of_new_rows(again), of_new_rows(net))
    close(of_new_rows(peft.PeftModel.from_pretrained(resized(base, 4), tmp_path / "again").eval()), of_new_rows(other))
    unload(net)
    assert torch.equal(of_new_rows(net), before)
    with torch.no_grad():
        net.model.embed_tokens.weight[:40].mul_(1.1)
    with pytest.raises(LoRAError, match=r"another base: values of 'model\.embed_tokens\.weight'"):
        load_adapter(net, tmp_path / "adapter")


class Resized(L.LightningModule):
    """Draws new rows with `seed`."""

    def __init__(self, base: str, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = resized(Path(base), seed).train()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0], labels=batch[0]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


@each_tie
def test_rows_resized_before_injection_are_saved_for_peft_and_come_back(tmp_path: Path, base: Path):
    net = resized(base, 1)
    inject(net, LoRAConfig(r=4, target_modules=["q_proj"]))
    fill_(net)
    save_adapter(net, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(resized(base, 2), tmp_path / "adapter").eval()
    close(of_new_rows(read), of_new_rows(net))
    load_adapter(other := resized(base, 3), tmp_path / "adapter")
    assert torch.equal(of_new_rows(other), of_new_rows(net))
    assert not other.model.embed_tokens.weight.requires_grad
    with pytest.raises(LoRAError, match=r"has 70 rows, in the model 64.*model\.resize_token_embeddings\(70\)"):
        load_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    before = of_new_rows(fresh := resized(base, 4))
    load_adapter(fresh, tmp_path / "adapter")
    unload(fresh)
    assert torch.equal(of_new_rows(fresh), before)


@pytest.mark.slow
def test_checkpoint_of_a_resized_model_loads_and_resumes_with_rows_drawn_anew(tmp_path: Path, base: Path):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(66, 70)[None]))
    trainer = make_trainer(tmp_path, LoRACallback(r=2, target_modules=["q_proj"]), max_epochs=1)
    trainer.fit(module := Resized(str(base), 1), data)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Resized, path, seed=2)
    assert torch.equal(of_new_rows(loaded.net.eval()), of_new_rows(module.net.eval()))
    again = make_trainer(tmp_path, LoRACallback(r=2, target_modules=["q_proj"]), max_epochs=1)
    again.fit(resumed := Resized(str(base), 3), data, ckpt_path=path)
    assert torch.equal(of_new_rows(resumed.net.eval()), of_new_rows(module.net))


def test_an_adapter_from_before_the_resizing_loads_onto_the_resized_model(tmp_path: Path, base: Path):
    other = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    spread_(other)
    other.save_pretrained(str(tmp_path / "adapter"))
    load_adapter(net := resized(base, 1), tmp_path / "adapter")
    rows = torch.tensor([[1, 5, 2, 7]])
    with torch.no_grad():
        close(net(rows).logits[..., :64], other.eval()(rows).logits)


def test_a_model_of_its_checkpoints_size_keeps_its_embeddings_in_the_base(tmp_path: Path, base: Path):
    resized(base, 1).save_pretrained(tmp_path / "larger")
    net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "larger")
    inject(net, LoRAConfig(r=4, target_modules=["q_proj"]))
    assert not any("embed" in name or "head" in name for name in adapter_state_dict(net))
