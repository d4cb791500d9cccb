"""A normal run, the one to copy: fine-tune a transformers model, watch it, stop early, test the best, and deploy.

pip install -e ".[examples]"
python examples/finetune.py

Ctrl-C interrupts it, and the same command goes on from the last epoch. Delete runs/finetune to start anew.

The task: which package of Python's library is a docstring from?
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, random_split
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_lora import (
    LoRACallback,
    LoRAMonitor,
    export_adapter,
    load_from_checkpoint,
    merge_and_unload,
    save_merged,
)
from small_models import docstrings, manual_bert

BASE = str(manual_bert())  # or a name on the hub, such as "answerdotai/ModernBERT-base"
CLASSES = ["asyncio", "email", "logging", "unittest", "xml"]
RUN = Path("runs", "finetune")


def pretrained(base: str) -> Any:
    """The base with a new head."""
    names: dict[str, Any] = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }
    return AutoModelForSequenceClassification.from_pretrained(base, **names, ignore_mismatched_sizes=True)


class Classifier(L.LightningModule):
    """An ordinary LightningModule around a transformers model; it knows nothing of LoRA."""

    def __init__(self, base: str = BASE, learning_rate: float = 0.001) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.model = pretrained(base).train()  # from_pretrained leaves it in eval mode, without dropout
        self.accuracy = MulticlassAccuracy(len(CLASSES), average="micro")

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        outputs = self.model(**batch)
        self.accuracy(outputs.logits, batch["labels"])
        self.log(f"{stage}_loss", outputs.loss, prog_bar=True)
        self.log(f"{stage}_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Docstrings(L.LightningDataModule):
    """Docstrings of five packages: three fifths to train on, one to validate on, one to test on."""

    def __init__(self, base: str = BASE) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def setup(self, stage: str) -> None:
        examples: Any = [(text, label) for label, package in enumerate(CLASSES) for text in docstrings(package)]
        fixed = torch.Generator().manual_seed(0)  # a run that goes on must not train on what it was tested on
        self.train, self.val, self.test = random_split(examples, [0.6, 0.2, 0.2], fixed)

    def tokens(self, examples: list[tuple[str, int]]) -> dict[str, Tensor]:
        """One batch, padded to its longest text."""
        texts, labels = zip(*examples, strict=True)
        tokens = self.tokenizer([*texts], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=32, shuffle=True, collate_fn=self.tokens)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=128, collate_fn=self.tokens)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=128, collate_fn=self.tokens)


def answer(model: Any, tokenizer: Any, text: str) -> str:
    """The package that a transformers model names for a text."""
    with torch.no_grad():
        logits = model.eval()(**tokenizer(text, return_tensors="pt")).logits
    return str(model.config.id2label[int(logits.argmax())])


if __name__ == "__main__":
    # Train, or go on with the last run
    L.seed_everything(0)
    model, data = Classifier(), Docstrings()
    lora = LoRACallback(
        r=8,
        lora_alpha=32,
        target_modules=["word_embeddings", "query", "key", "value", "dense"],  # many words are new to the base
        modules_to_save=["classifier"],
    )
    checkpoint = ModelCheckpoint(RUN, filename="best", monitor="val_loss", save_last=True)
    trainer = L.Trainer(
        max_epochs=20,
        logger=TensorBoardLogger(RUN, name=None, version="logs"),
        callbacks=[lora, LoRAMonitor(every_n_steps=10), checkpoint, EarlyStopping("val_loss", patience=3)],
        log_every_n_steps=10,
    )
    trainer.fit(model, data, ckpt_path="last")  # at the first run Lightning warns that there is none

    # Test the best epoch
    (tested,) = trainer.test(model, data, ckpt_path="best")
    print(f"test accuracy: {tested['test_accuracy']:.2f}")

    # Deploy the adapter, for PEFT and servers
    text = "Parse the headers of a message."
    export_adapter(checkpoint.best_model_path, RUN / "adapter")
    adapted = PeftModel.from_pretrained(pretrained(BASE), RUN / "adapter")
    print("adapter, by peft:       ", answer(adapted, data.tokenizer, text))

    # Deploy merged weights, for transformers
    save_merged(model, RUN / "merged")
    data.tokenizer.save_pretrained(RUN / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(RUN / "merged")
    print("merged, by transformers:", answer(merged, data.tokenizer, text))

    # Deploy in memory, from the checkpoint of the best epoch
    tuned = load_from_checkpoint(Classifier, checkpoint.best_model_path)
    merge_and_unload(tuned)
    print("checkpoint, in memory:  ", answer(tuned.model, data.tokenizer, text))
