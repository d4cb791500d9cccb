"""A variant of your own: LoRA-XS (arXiv:2405.17604) trains a square between singular vectors of each weight.

pip install -e ".[examples]"
python examples/own_variant.py

The class says what a layer stores, how that starts, and which two factors it acts as: W' = W + s * B' @ A'. Training,
exact merging, checkpoints, resuming and loading follow from that. A network that reads digits learns them mirrored.
"""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, Variant, load_adapter, merged

RUNS = Path(__file__).with_name("runs")
Loader = DataLoader[tuple[Tensor, ...]]


class SquareBetween(Variant):
    name, trained, frozen = "square-between", ("lora_between_square",), ("lora_between_A", "lora_between_B")

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.leaves, ((info.rank, info.rank), *info.factor_shapes()), strict=True))

    def start(self, info: Any, weight: Any) -> dict[str, Tensor]:
        left, values, right = torch.linalg.svd(weight(), full_matrices=False)
        square, a, b = torch.zeros(info.rank, info.rank), right[: info.rank], (left * values)[:, : info.rank]
        return dict(zip(self.leaves, (square, a, b), strict=True))

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        square, a, b = (stored[leaf] for leaf in self.leaves)
        return square @ a, b, None  # A', B' and no scale


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(model: Digits, data: Loader, epochs: int, *callbacks: L.Callback, resume: Path | None = None) -> L.Trainer:
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks], default_root_dir=RUNS, **quiet)
    trainer.fit(model, data, ckpt_path=resume)
    return trainer


def accuracy(trainer: L.Trainer, model: Digits, data: Loader) -> str:
    return f"{trainer.validate(model, data, verbose=False)[0]['accuracy']:.2f}"


if __name__ == "__main__":
    L.seed_everything(0)
    pixels, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 8, 8) / 16
    upright, mirrored = (DataLoader(TensorDataset(x.flatten(1), labels), 64) for x in (images, images.flip(2)))
    model = Digits()
    before = accuracy(fit(model, upright, 10), model, mirrored)
    whole, part, resumed, loaded = (copy.deepcopy(model) for _ in range(4))
    options: Any = {"variant": "square-between", "r": 8, "lora_alpha": 8}
    trainer = fit(whole, mirrored, 6, LoRACallback(**options))
    print(f"accuracy on mirrored digits: {before} before, {accuracy(trainer, whole, mirrored)} after")  # merged

    path, x = RUNS / "own_variant.ckpt", next(iter(mirrored))[0]
    fit(part, mirrored, 3, LoRACallback(**options)).save_checkpoint(path)
    fit(resumed, mirrored, 6, LoRACallback(), resume=path)
    load_adapter(loaded, path)
    print(f"half of it, saved and resumed, is as the whole: {torch.equal(resumed.net(x), whole.net(x))}")
    print(f"loaded into another model, it answers the same: {torch.equal(loaded.net(x), part.net(x))}")

    layer: Any = whole.net[0]
    weight = layer.weight.clone()
    with merged(whole):
        print(f"merged, it answers the same: {torch.allclose(whole.net(x), resumed.net(x), atol=1e-4)}")
    print(f"afterwards every bit of W is back: {torch.equal(layer.weight, weight)}")
