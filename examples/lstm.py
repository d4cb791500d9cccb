"""Recurrent networks: an LSTM that restores capital letters goes from English to Python, by target_parameters.

pip install -e ".[examples]"
python examples/lstm.py

An LSTM is one module with several weights, so its parameters are named. Stacks of experts are adapted in the same way:
target_parameters=["gate_up_proj", "down_proj"].
"""

import argparse
import inspect
from pathlib import Path
from pydoc_data.topics import topics
from typing import cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryF1Score

from lightning_lora import LoRACallback

LINE = "class myformatter(helpformatter): raise argumenterror(none, msg)"
PRETRAINED = Path(__file__).with_name("capitals_lstm.pt")


class Capitals(nn.Module):
    """Which of the characters, all in lower case (n, length), were capital letters? Logits (n, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 1)

    def forward(self, characters: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(characters))
        return cast(Tensor, self.head(states).squeeze(-1))


class CapitalsModule(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = pretrained()
        self.f1 = BinaryF1Score()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        characters, capitals = batch
        return F.binary_cross_entropy_with_logits(self.network(characters), capitals.float())

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        characters, capitals = batch
        self.f1(self.network(characters), capitals)
        self.log("f1", self.f1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def pieces(text: str) -> TensorDataset:
    """Pieces of 128 characters in lower case, and where the capital letters were."""
    characters = torch.tensor(list(text.encode("ascii", "replace"))).unfold(0, 128, 128)
    capitals = (characters >= ord("A")) & (characters <= ord("Z"))
    return TensorDataset(torch.where(capitals, characters + 32, characters), capitals)


def english() -> TensorDataset:
    return pieces("\n".join(topics.values()))


def pretrained() -> Capitals:
    """An LSTM that has read Python's manual; trained at the first call, then read from a file next to this one."""
    with torch.random.fork_rng(devices=[]):  # what follows draws the same numbers, whether this trains or not
        torch.manual_seed(0)
        network = Capitals()
        if not PRETRAINED.exists():
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
            for _ in range(4):
                for characters, capitals in DataLoader(english(), batch_size=32, shuffle=True):
                    optimizer.zero_grad()
                    loss = F.binary_cross_entropy_with_logits(network(characters), capitals.float())
                    loss.backward()
                    optimizer.step()
            torch.save(network.state_dict(), PRETRAINED)
    network.load_state_dict(torch.load(PRETRAINED, weights_only=True))
    return network


def score(trainer: L.Trainer, model: CapitalsModule, data: DataLoader[tuple[Tensor, ...]]) -> str:
    return f"{trainer.validate(model, data, verbose=False)[0]['f1']:.2f}"


@torch.no_grad()
def restore(model: CapitalsModule, text: str) -> str:
    characters = torch.tensor(list(text.encode()))
    capitals = model.network(characters[None])[0] > 0
    return bytes(torch.where(capitals, characters - 32, characters).tolist()).decode()


if __name__ == "__main__":
    L.seed_everything(0)
    model = CapitalsModule()
    train, validate = torch.utils.data.random_split(pieces(inspect.getsource(argparse)), [0.75, 0.25])
    lora = LoRACallback(
        r=8,
        lora_alpha=16,
        target_modules=[],
        target_parameters=["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        modules_to_save=["head"],  # one output: nothing that a low rank would save
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=12,
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    code = DataLoader(validate, batch_size=64)
    print(f"F1 on English:              {score(trainer, model, DataLoader(english(), batch_size=256))}")
    print(f"F1 on Python code, before:  {score(trainer, model, code)}  {restore(model, LINE)}")
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    print(f"F1 on Python code, after:   {score(trainer, model, code)}  {restore(model, LINE)}")
