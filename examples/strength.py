"""How strong should an adapter be? Its strength is swept from 0 (the base) over 1 (as trained) to 1.5, after training.

pip install -e ".[examples]"
python examples/strength.py

A network that reads digits learns to read them mirrored, and forgets a part of the old skill. Between the two lie
strengths that keep most of both: robust fine-tuning of zero-shot models, Wortsman et al. 2021,
https://arxiv.org/abs/2109.01903, which averages the weights before and after a fine-tune.
"""

from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_lora import LoRACallback, scaled
from small_models import digits, digits_mlp

PICTURE = Path(__file__).with_name("runs") / "strength.png"
STRENGTHS = [step / 8 for step in range(13)]  # 0 to 1.5


class Digits(L.LightningModule):
    def __init__(self, learning_rate: float = 0.003) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = digits_mlp()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


@torch.no_grad()
def accuracy(model: Digits, data: Dataset[tuple[Tensor, ...]]) -> float:
    images, labels = next(iter(DataLoader(data, batch_size=500)))
    return float((model.network(images).argmax(1) == labels).float().mean())


def draw(curves: dict[str, list[float]]) -> None:
    grey = "#808080"  # is read on light and on dark pages
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, values in curves.items():
        axes.plot(STRENGTHS, values, marker="o", markersize=4, label=name)
    axes.axvline(1, color=grey, linewidth=0.8, linestyle=":")
    axes.set_xlabel("strength of the adapter: 0 is the base, 1 is as trained", color=grey)
    axes.set_ylabel("accuracy", color=grey)
    axes.tick_params(colors=grey)
    axes.spines[:].set_color(grey)
    axes.legend(frameon=False, labelcolor=grey)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150, transparent=True)


if __name__ == "__main__":
    L.seed_everything(0)
    model = Digits()
    learned = digits(mirrored=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=10,
        callbacks=[LoRACallback(r=8, lora_alpha=8)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Subset(learned, range(400)), batch_size=20, shuffle=True))
    held_out = {
        "mirrored": Subset(learned, range(400, 900)),
        "upright": Subset(digits(mirrored=False), range(400, 900)),
    }
    curves: dict[str, list[float]] = {"mirrored": [], "upright": [], "mean": []}
    for strength in STRENGTHS:
        with scaled(model, strength):
            found = {name: accuracy(model, data) for name, data in held_out.items()}
        for name, value in {**found, "mean": sum(found.values()) / 2}.items():
            curves[name].append(value)
    print("strength  mirrored  upright  mean")
    for strength, *values in zip(STRENGTHS, *curves.values(), strict=True):
        if strength % 0.25 == 0:
            print(f"{strength:8.3f}  {values[0]:8.3f}  {values[1]:7.3f}  {values[2]:.3f}")
    best = max(STRENGTHS, key=lambda strength: curves["mean"][STRENGTHS.index(strength)])
    print(f"best for both: {best}")
    draw(curves)
