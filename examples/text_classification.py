"""Text classification: a transformers model gets a new head, which is trained together with the adapter.

pip install -e ".[examples]"
python examples/text_classification.py

The task: which package of Python's library is a docstring from? The model has learned from Python's manual before.
"""

from pathlib import Path
from typing import cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from lightning_lora import LoRACallback, load_from_checkpoint
from small_models import docstrings, manual_bert

PACKAGES = ("asyncio", "email", "logging", "unittest", "xml")
RUNS = Path(__file__).with_name("runs")


class Classifier(L.LightningModule):
    """An ordinary LightningModule around a transformers model; it knows nothing of LoRA."""

    def __init__(self, learning_rate: float = 0.002) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = BertForSequenceClassification.from_pretrained(
            manual_bert(), num_labels=len(PACKAGES), ignore_mismatched_sizes=True
        )
        self.accuracy = MulticlassAccuracy(len(PACKAGES), average="micro")

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=(tokens > 0).long()).logits
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        return torch.nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        tokens, labels = batch
        self.accuracy(self(tokens), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Docstrings(L.LightningDataModule):
    """Docstrings of five packages, three quarters of them to train on and the rest to validate on."""

    def setup(self, stage: str) -> None:
        texts, labels = [], []
        for label, package in enumerate(PACKAGES):
            found = docstrings(package)
            texts += found
            labels += [label] * len(found)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(manual_bert())
        data = TensorDataset(encode(texts, tokenizer), torch.tensor(labels))
        self.train, self.validate = random_split(data, [0.75, 0.25], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validate, batch_size=128)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Tokens (n, 48), padded by 0."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
    return cast(Tensor, encoded["input_ids"])


if __name__ == "__main__":
    L.seed_everything(0)
    model, data = Classifier(), Docstrings()
    lora = LoRACallback(
        r=8,
        lora_alpha=32,
        target_modules=["word_embeddings", "query", "key", "value", "dense"],  # many words are new to the base
        modules_to_save=["classifier"],
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=8,
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(model, data, verbose=False)[0]["accuracy"]
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["accuracy"]
    print(f"accuracy on {len(data.validate)} docstrings: {before:.2f} before, {after:.2f} after")

    trainer.save_checkpoint(RUNS / "docstrings.ckpt", weights_only=True)
    saved = torch.load(RUNS / "docstrings.ckpt", weights_only=True)["state_dict"]
    print("saved whole:", [name for name in saved if "lora_" not in name])
    loaded = load_from_checkpoint(Classifier, RUNS / "docstrings.ckpt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(manual_bert())
    tokens = encode(["Parse the headers of a message.", "Wait until the task is done."], tokenizer)
    print("loaded again:", [PACKAGES[i] for i in loaded.eval()(tokens).argmax(1)])
