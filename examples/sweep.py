"""A sweep over the learning rate and then over r, read back from the logger: which rank is enough?

pip install -e ".[examples]"
python examples/sweep.py

A network that reads digits learns to read them mirrored. The learning rate is tuned first, with a small r, because the
best rate hardly depends on r. The callback gives every logger its options as hyper-parameters, so that a run's folder
says what r and learning rate it had; TensorBoard's HParams tab shows the same table.
"""

import csv
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback
from small_models import digits, digits_mlp

RUNS = Path(__file__).with_name("runs") / "sweep"
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
RANKS = (1, 2, 4, 8, 16)
SMALL = 4  # the rank with which the learning rate is tuned


class Digits(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = digits_mlp()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def train(r: int, learning_rate: float) -> None:
    """One run: 400 mirrored digits to train on, 500 to validate on."""
    L.seed_everything(0)
    data = digits(mirrored=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=10,
        logger=CSVLogger(RUNS, name=f"r={r}, rate={learning_rate}", version=0),
        callbacks=[LoRACallback(r=r, lora_alpha=r)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Digits(learning_rate),
        DataLoader(Subset(data, range(400)), batch_size=20, shuffle=True),
        DataLoader(Subset(data, range(400, 900)), batch_size=100),
    )


def read(run: Path) -> tuple[int, float, list[float]]:
    """The rank and learning rate of a run, and its accuracy after each epoch, from what the logger wrote."""
    hyperparameters = load_hparams_from_yaml(run / "hparams.yaml")
    with (run / "metrics.csv").open() as file:
        accuracies = [float(row["accuracy"]) for row in csv.DictReader(file)]
    return hyperparameters["lora/r"], hyperparameters["learning_rate"], accuracies


def runs() -> list[tuple[int, float, list[float]]]:
    return sorted(read(file.parent) for file in RUNS.rglob("hparams.yaml"))


def show(name: object, accuracies: list[float]) -> None:
    print(f"{name:>5}  {accuracies[0]:.3f}  {accuracies[4]:.3f}  {accuracies[9]:.3f}")


if __name__ == "__main__":
    for rate in RATES:
        train(SMALL, rate)
    print(f" rate  accuracy after 1, 5 and 10 epochs, with r = {SMALL}")
    tuned = [(rate, accuracies) for r, rate, accuracies in runs() if r == SMALL]
    for rate, accuracies in tuned:
        show(rate, accuracies)
    best, _ = max(tuned, key=lambda run: run[1][-1])
    for r in RANKS:
        train(r, best)
    print(f"    r  with the best rate, {best}")
    for r, rate, accuracies in runs():
        if rate == best:
            show(r, accuracies)
