"""A variant of your own: LoRA-XS (arXiv:2405.17604) trains a square between singular vectors of each weight.

pip install -e ".[examples]"
python examples/own_variant.py

The class says what a layer stores, how that starts, and which two factors it acts as: W' = W + s * B' @ A'. Training,
exact merging, checkpoints, resuming and loading follow from that. A network that reads digits learns them mirrored.
"""

import copy
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, Variant, load_adapter, merged


class XS(Variant):
    name, trained, frozen = "xs", ("lora_xs_square",), ("lora_xs_A", "lora_xs_B")

    def shapes(self, place: Any) -> dict[str, tuple[int, ...]]:
        a, b = place.factor_shapes()
        return {"lora_xs_square": (place.rank, place.rank), "lora_xs_A": a, "lora_xs_B": b}

    def start(self, place: Any, weights: Any) -> dict[str, Tensor]:
        left, values, right = torch.linalg.svd(weights()["weight"], full_matrices=False)
        a, b = right[: place.rank], left[:, : place.rank] * values[: place.rank]
        return {"lora_xs_square": torch.zeros(place.rank, place.rank), "lora_xs_A": a, "lora_xs_B": b}

    def acting(self, stored: Any, weight: Any, scaling: float) -> Any:
        return stored["lora_xs_square"] @ stored["lora_xs_A"], stored["lora_xs_B"], None


class Digits(L.LightningModule):
    net = None

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks], default_root_dir="runs", **quiet)


if __name__ == "__main__":
    L.seed_everything(0)
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    upright = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=64)
