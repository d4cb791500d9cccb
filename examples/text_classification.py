"""Text classification: a transformers model gets a new head, which is trained whole beside the adapter.

pip install -e ".[examples]"
python examples/text_classification.py

The task: which package of Python's library is a docstring from? The model has learned from Python's manual before.
"""

import ast
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import cast

import lightning as L
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lightning_lora import LoRACallback, load_from_checkpoint

PACKAGES = ("asyncio", "email", "logging", "unittest", "xml")
RUNS = Path(__file__).with_name("runs")


class Classifier(L.LightningModule):
    """An ordinary LightningModule around a transformers model; it knows nothing of LoRA."""

    def __init__(self, learning_rate: float = 0.002) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = BertForSequenceClassification.from_pretrained(
            pretrained(), num_labels=len(PACKAGES), ignore_mismatched_sizes=True
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
            found = docstrings(Path(sysconfig.get_path("stdlib"), package))
            texts += found
            labels += [label] * len(found)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained())
        data = TensorDataset(encode(texts, tokenizer), torch.tensor(labels))
        self.train, self.validate = random_split(data, [0.75, 0.25], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validate, batch_size=128)


def docstrings(package: Path) -> list[str]:
    """The first paragraph of each docstring of functions and classes in a folder."""
    nodes = (node for path in sorted(package.rglob("*.py")) for node in ast.walk(ast.parse(path.read_bytes())))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return sorted({text.split("\n\n")[0] for text in found if len(text) > 20})


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Tokens (n, 48), padded by 0."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
    return cast(Tensor, encoded["input_ids"])


def pretrained() -> Path:
    """The folder of a small BERT that tells the topics of Python's manual apart; trained at the first call."""
    folder = Path(__file__).with_name("manual_bert")
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):  # what follows draws the same numbers, whether this trains or not
            tokenizer = train_tokenizer()
            paragraphs = [
                (text, label)
                for label, topic in enumerate(topics.values())
                for text in topic.split("\n\n")
                if len(text) > 40
            ]
            texts, labels = zip(*paragraphs, strict=True)
            data = TensorDataset(encode([*texts], tokenizer), torch.tensor(labels))
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=4000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
            config.num_labels = len(topics)
            model = BertForSequenceClassification(config)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
            for _ in range(6):
                for tokens, label in DataLoader(data, batch_size=32, shuffle=True):
                    optimizer.zero_grad()
                    model(input_ids=tokens, attention_mask=(tokens > 0).long(), labels=label).loss.backward()
                    optimizer.step()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT tokenizer of 4000 pieces of words from Python's manual."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(topics.values(), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


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
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained())
    tokens = encode(["Parse the headers of a message.", "Wait until the task is done."], tokenizer)
    print("loaded again:", [PACKAGES[i] for i in loaded.eval()(tokens).argmax(1)])
