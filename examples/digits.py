"""Images: a small CNN that reads digits learns to read them mirrored, from 100 labelled images.

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

from lightning_lora import LoRACLI, disable_adapter, summary

PRETRAINED = Path(__file__).with_name("digits_upright.pt")

Loader = DataLoader[tuple[Tensor, ...]]


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

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class DigitsData(L.LightningDataModule):
    """100 digits to adapt to, 200 to validate on and 500 to test on; the pretrained CNN has seen none of them."""

    def __init__(self, mirrored: bool = True) -> None:
        super().__init__()
        self.splits = splits(mirrored)

    def train_dataloader(self) -> Loader:
        return DataLoader(self.splits["train"], batch_size=20, shuffle=True)

    def val_dataloader(self) -> Loader:
        return DataLoader(self.splits["validate"], batch_size=100)

    def test_dataloader(self) -> Loader:
        return DataLoader(self.splits["test"], batch_size=100)


def splits(mirrored: bool) -> dict[str, TensorDataset]:
    """The digits of scikit-learn in four disjoint parts, each with all ten classes in proportion."""
    digits = load_digits()
    rest, parts = range(len(digits.target)), {}
    for name, size in (("test", 500), ("validate", 200), ("train", 100)):
        rest, parts[name] = train_test_split(rest, test_size=size, stratify=digits.target[rest], random_state=0)
    parts["pretrain"] = rest
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images, labels = images.flip(-1) if mirrored else images, torch.tensor(digits.target)
    return {name: TensorDataset(images[part], labels[part]) for name, part in parts.items()}


def pretrained() -> CNN:
    """A CNN that reads upright digits; trained at the first call, then read from a file next to this one."""
    with torch.random.fork_rng(devices=[]):  # what follows draws the same numbers, whether this trains or not
        torch.manual_seed(0)
        cnn = CNN()
        if not PRETRAINED.exists():
            optimizer = torch.optim.AdamW(cnn.parameters(), lr=0.002)
            for _ in range(20):
                for images, labels in DataLoader(splits(mirrored=False)["pretrain"], batch_size=64, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(cnn(images), labels).backward()
                    optimizer.step()
            torch.save(cnn.state_dict(), PRETRAINED)
    cnn.load_state_dict(torch.load(PRETRAINED, weights_only=True))
    return cnn


class DigitsCLI(LoRACLI):
    """`fit` tests before and after training; the Trainer evaluates the merged model."""

    def before_fit(self) -> None:
        print(f"mirrored digits, before:           {self.accuracy(self.datamodule):.3f}")

    def after_fit(self) -> None:
        print(f"mirrored digits, with LoRA:        {self.accuracy(self.datamodule):.3f}")
        upright = DigitsData(mirrored=False)
        print(f"upright digits, with LoRA:         {self.accuracy(upright):.3f}")
        with disable_adapter(self.model):
            print(f"upright digits, adapter disabled:  {self.accuracy(upright):.3f}")
        adapted = summary(self.model)
        print(f"trained:                           {adapted.trainable:,} of {adapted.total:,} parameters")
        checkpoint = Path(self.trainer.default_root_dir) / "adapter.ckpt"
        self.trainer.save_checkpoint(checkpoint, weights_only=True)
        print(f"{checkpoint.name}:                      {checkpoint.stat().st_size:,} bytes")

    def accuracy(self, data: L.LightningDataModule) -> float:
        return self.trainer.test(self.model, data, verbose=False)[0]["accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small only wait for a second thread
    DigitsCLI(Digits, DigitsData, save_config_callback=None)
