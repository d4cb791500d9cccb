"""Preferences: DPO, with the model whose adapter is disabled as the reference, so that there is one model in memory.

pip install -e ".[examples]"
python examples/preference.py

Python's library mostly writes "Return the name" in docstrings. The model is taught to prefer "Returns the name", and is
judged by verbs that were not among those that it was taught with. Direct preference optimization: Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, disable_adapter
from small_models import manual_llama, preferences


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

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad(), disable_adapter(self):
            reference = self.log_ratio(*batch)
        return -F.logsigmoid(self.beta * (self.log_ratio(*batch) - reference)).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("prefers", (self.log_ratio(*batch) > 0).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    L.seed_everything(0)
    model = DPO()
    taught, held_out = preferences(), preferences(held_out=True)
    print(f"pairs: {len(taught)} to learn from, {len(held_out)} of other verbs")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[LoRACallback(r=8, lora_alpha=16)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(held_out, batch_size=64)
    before = trainer.validate(model, data, verbose=False)[0]["prefers"]
    trainer.fit(model, DataLoader(taught, batch_size=16, shuffle=True))
    after = trainer.validate(model, data, verbose=False)[0]["prefers"]
    with disable_adapter(model):
        reference = (model.log_ratio(*held_out[:]) > 0).float().mean()
    print(f'prefers "Returns" to "Return": {before:.0%} before, {after:.0%} after')
    print(f"the reference, which is the same model without its adapter: {reference:.0%}")
