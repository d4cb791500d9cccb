"""A sweep over r, read back from the logger: which rank is enough?

pip install -e ".[examples]"
python examples/sweep.py

A CNN that reads digits learns to read them mirrored, with each rank. The callback gives every logger its options as
hyper-parameters, so that a run's folder says what r it had; TensorBoard's HParams tab shows the same table.
"""

import csv
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback

RUNS = Path(__file__).with_name("runs") / "sweep"
PRETRAINED = Path(__file__).with_name("digits_mlp.pt")


class Digits(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = pretrained()
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


def digits(mirrored: bool) -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return TensorDataset((images.flip(-1) if mirrored else images).flatten(1), torch.tensor(data.target))


def pretrained() -> nn.Sequential:
    """A network that reads upright digits, the last 900; trained at the first call, then read from a file."""
    with torch.random.fork_rng(devices=[]):  # what follows draws the same numbers, whether this trains or not
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        if not PRETRAINED.exists():
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
            data = Subset(digits(mirrored=False), range(900, 1797))
            for _ in range(20):
                for images, labels in DataLoader(data, batch_size=32, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(network(images), labels).backward()
                    optimizer.step()
            torch.save(network.state_dict(), PRETRAINED)
    network.load_state_dict(torch.load(PRETRAINED, weights_only=True))
    return network


def train(r: int) -> None:
    """One run: 400 mirrored digits to train on, 500 to validate on."""
    L.seed_everything(0)
    data = digits(mirrored=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=10,
        logger=CSVLogger(RUNS, name=f"r={r}", version=0),
        callbacks=[LoRACallback(r=r, lora_alpha=r)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Digits(),
        DataLoader(Subset(data, range(400)), batch_size=20, shuffle=True),
        DataLoader(Subset(data, range(400, 900)), batch_size=100),
    )


def read(run: Path) -> tuple[int, list[float]]:
    """The rank of a run and its accuracy after each epoch, from what the logger wrote."""
    hyperparameters = load_hparams_from_yaml(run / "hparams.yaml")
    with (run / "metrics.csv").open() as file:
        return hyperparameters["lora/r"], [float(row["accuracy"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    for r in (1, 2, 4, 8, 16):
        train(r)
    print("  r  accuracy after 1, 5 and 10 epochs")
    for r, accuracies in sorted(read(file.parent) for file in RUNS.rglob("hparams.yaml")):
        print(f"{r:>3}  {accuracies[0]:.3f}  {accuracies[4]:.3f}  {accuracies[9]:.3f}")
