"""Two stages with one base in memory: an adapter of supervised fine-tuning (SFT), and DPO that goes on from it with a
new adapter, and with the SFT model as its reference.

pip install -e ".[examples]"
python examples/dpo_after_sft.py

A small Llama that has read Python's manual first learns code with docstrings, which mostly say "Return the name". DPO
then teaches it "Returns the name", as preference.py does. The SFT adapter is attached and frozen, so the reference
is the same model while the new adapter is off. The last line checks that against two models, as most programs
hold them. Direct preference optimization: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.
"""

import re
import sysconfig
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, load_adapter, save_adapter, scaled
from small_models import encode, manual_llama, preferences

SFT_ADAPTER = Path(__file__).with_name("runs") / "sft"


class SFT(L.LightningModule):
    def __init__(self, learning_rate: float = 0.005) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0].masked_fill(batch[0] == 0, -100)).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class DPO(L.LightningModule):
    def __init__(self, beta: float = 0.5, learning_rate: float = 0.003) -> None:
        super().__init__()
        self.beta, self.learning_rate = beta, learning_rate
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def log_ratio(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """How much more probable the chosen text is than the rejected one; (n, length) each, of the same prompts."""
        return self.log_probability(chosen) - self.log_probability(rejected)

    def log_probability(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, attention_mask=(tokens > 0).long()).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=0, reduction="none")
        return -losses.sum(1)  # of the prompt too, which is the same in both

    def margins(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad(), scaled(self, 0.0):
            reference = self.log_ratio(*batch)
        return self.log_ratio(*batch) - reference

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -F.logsigmoid(self.beta * self.margins(batch)).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("margin", self.margins(batch).mean())
        self.log("prefers", (self.log_ratio(*batch) > 0).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def documented_code() -> TensorDataset:
    """Heads of functions of Python's library with the first line of their docstrings, as they are."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = "".join(path.read_text("utf-8", "replace") for path in files)
    texts = re.findall(r'def \w+\(.*\):\n +"""[^\n"]+', source)
    return TensorDataset(torch.nn.utils.rnn.pad_sequence([encode(text[-96:]) for text in texts], batch_first=True))


def trainer(epochs: int, callback: LoRACallback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def margins_of_two_models(trained: DPO, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same with a second model for the reference: the base with the SFT adapter."""
    second = DPO()
    load_adapter(second, SFT_ADAPTER)
    return trained.log_ratio(*batch) - second.log_ratio(*batch)


if __name__ == "__main__":
    L.seed_everything(0)
    first = SFT()
    trainer(1, LoRACallback(r=8, lora_alpha=16)).fit(first, DataLoader(documented_code(), 16, shuffle=True))
    save_adapter(first, SFT_ADAPTER)

    taught, held_out = preferences(), preferences(held_out=True)
    model, data = DPO(), DataLoader(held_out, batch_size=64)
    # Merged, each step of a validation would be unmerged by `scaled`.
    dpo = trainer(3, LoRACallback(r=8, lora_alpha=16, attach={"sft": SFT_ADAPTER}, merged_eval=False))
    before = dpo.validate(model, data, verbose=False)[0]
    dpo.fit(model, DataLoader(taught, batch_size=16, shuffle=True))
    after = dpo.validate(model, data, verbose=False)[0]
    print(f'prefers "Returns" to "Return": {before["prefers"]:.0%} after SFT, {after["prefers"]:.0%} after DPO')
    print(f"margin over the SFT model: {before['margin']:.1f} before, {after['margin']:.1f} after DPO")
    with torch.no_grad():
        one, two = model.margins(held_out[:]), margins_of_two_models(model, held_out[:])
    print(f"margin by two models: {two.mean():.1f}, the same for each pair: {torch.allclose(one, two, atol=1e-3)}")
