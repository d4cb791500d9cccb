"""Text: a causal language model in bfloat16 goes from English to Python, and writes some at each validation.

pip install -e ".[examples]"
python examples/causal_lm.py
"""

import argparse
import inspect

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, is_merged
from small_models import encode, manual_llama


class LanguageModel(L.LightningModule):
    """An ordinary LightningModule around a transformers model, whose tokens are characters."""

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = LlamaForCausalLM.from_pretrained(manual_llama(), dtype=torch.bfloat16)

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Log the loss, and write a line; the adapter is merged, so both run at the plain model's speed."""
        self.log("loss", self.model(input_ids=tokens, labels=tokens).loss)
        if batch_idx == 0:
            self.written, self.was_merged = self.write("    def "), is_merged(self)

    def on_validation_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["loss"]
        print(f"loss {loss:.2f}, {'merged' if self.was_merged else 'not merged'}: {self.written!r}")

    def write(self, start: str) -> str:
        tokens = self.model.generate(encode(start)[None], max_new_tokens=48, do_sample=False)
        return bytes(tokens[0].tolist()).decode()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class PythonCode(L.LightningDataModule):
    """The source of argparse, in pieces of 128 characters: nine tenths to train on, the rest to validate on."""

    def setup(self, stage: str) -> None:
        pieces = encode(inspect.getsource(argparse)).split(128)[:-1]
        cut = len(pieces) * 9 // 10
        self.train, self.validate = pieces[:cut], pieces[cut:]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, batch_size=16, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.validate, batch_size=64)


if __name__ == "__main__":
    L.seed_everything(0)
    model, data = LanguageModel(), PythonCode()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        num_sanity_val_steps=0,
        callbacks=[LoRACallback(r=16, lora_alpha=32)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
