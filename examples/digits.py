"""LoRA adapts a small CNN from upright to mirrored digits, with 100 labels, and prints what it cost and gained.

pip install -e ".[examples]"
python examples/digits.py fit --config examples/digits.yaml
"""

from pathlib import Path
from typing import cast

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from digits_report import Images, report_accuracy, report_merging, report_sizes, report_trainer
from lightning_lora import LoRACLI

HERE = Path(__file__).parent
PRETRAINED = HERE / "digits_upright.pt"

Batches = DataLoader[tuple[Tensor, ...]]


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return cast(Tensor, self.head(F.relu(self.hidden(x.flatten(1)))))


class Digits(L.LightningModule):
    """An ordinary LightningModule that starts from pretrained weights; it knows nothing of LoRA."""

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.cnn = pretrained()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.cnn(images))

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


class MirroredDigits(L.LightningDataModule):
    """100 mirrored digits to adapt to, and others for validation and test."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = {name: (images.flip(-1), labels) for name, (images, labels) in upright_splits().items()}

    def train_dataloader(self) -> Batches:
        return batches(self.splits["adapt"], 20, shuffle=True)

    def val_dataloader(self) -> Batches:
        return batches(self.splits["validate"], 100)

    def test_dataloader(self) -> Batches:
        return batches(self.splits["test"], 100)


def batches(data: Images, size: int, shuffle: bool = False) -> Batches:
    return DataLoader(TensorDataset(*data), size, shuffle)


def upright_splits() -> dict[str, Images]:
    """The digits of scikit-learn in four disjoint parts, each with all ten classes in proportion."""
    digits = load_digits()
    rest, parts = range(len(digits.target)), {}
    for name, size in (("test", 500), ("validate", 200), ("adapt", 100)):
        rest, parts[name] = train_test_split(rest, test_size=size, stratify=digits.target[rest], random_state=0)
    parts["pretrain"] = rest
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return {name: (images[indices], labels[indices]) for name, indices in parts.items()}


def pretrained() -> CNN:
    """A CNN that reads upright digits; trained once, then read from a file next to this one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cnn = CNN()
        if not PRETRAINED.exists():
            train(cnn, batches(upright_splits()["pretrain"], 64, shuffle=True), epochs=20, learning_rate=0.002)
            torch.save(cnn.state_dict(), PRETRAINED)
    cnn.load_state_dict(torch.load(PRETRAINED, weights_only=True))
    return cnn


def train(module: nn.Module, data: Batches, epochs: int, learning_rate: float) -> None:
    """A plain loop, for what is trained without LoRA."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(epochs):
        for images, labels in data:
            loss = F.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def head_only(data: MirroredDigits, trainer: L.Trainer, learning_rate: float) -> CNN:
    """The baseline: the last layer alone, trained on the same batches for as long."""
    cnn = pretrained().requires_grad_(False)
    cnn.head.requires_grad_(True)
    train(cnn, data.train_dataloader(), trainer.max_epochs or 0, learning_rate)
    return cnn


class DigitsCLI(LoRACLI):
    """`fit` is followed by a report on the test images, which nothing was chosen by."""

    def after_fit(self) -> None:
        upright, test = upright_splits()["test"], self.datamodule.splits["test"]
        baseline = head_only(self.datamodule, self.trainer, self.model.learning_rate)
        report_accuracy(self.model, test, upright, baseline)
        report_merging(self.model, test)
        report_trainer(self.trainer, self.model, self.datamodule)
        report_sizes(self.model, self.datamodule, test, HERE / "runs")


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small only wait for a second thread
    DigitsCLI(Digits, MirroredDigits, save_config_kwargs={"overwrite": True})
