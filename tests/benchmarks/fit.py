"""Group f: a whole Trainer.fit with validation, with the callback and with peft inside the LightningModule.

Group g: what the callback's own hooks take of a training step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import lightning as L
import torch
from groups import Options, Row
from measure import interleaved, milliseconds, ratio
from stack import ALPHA, TARGETS, R, peft, stack
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, inject

# Lightning's advice about a small run, and torch's about Lightning.
NOTICES = (
    "The '.*_dataloader' does not have many workers",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class Regression(L.LightningModule):
    def __init__(self, d: int, with_peft: bool) -> None:
        super().__init__()
        net = stack(d, torch.float32, "cpu")
        self.net = peft(net) if with_peft else net

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def f_fit(options: Options) -> Iterator[Row]:
    for d in options.widths[:2]:
        torch.manual_seed(2)
        data = TensorDataset(torch.randn(32, 64, d), torch.randn(32, 64, d))
        models = {name: Regression(d, name == "peft") for name in ("ours", "peft")}

        def fit(name: str, data: TensorDataset = data, models: dict[str, Regression] = models) -> None:
            lora = [LoRACallback(r=R, lora_alpha=ALPHA, target_modules=TARGETS)] if name == "ours" else []
            trainer = L.Trainer(
                max_epochs=2,
                callbacks=lora,
                accelerator=options.device if options.device == "cpu" else "gpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(models[name], DataLoader(data, 4), DataLoader(data, 4))

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for message in NOTICES:
                warnings.filterwarnings("ignore", message)
            times = interleaved({name: lambda n=name: fit(n) for name in models}, 3 * options.seconds, "cpu")
        yield Row("Trainer.fit with validation", f"d={d}", "ours", milliseconds(times, "ours"), "ms")
        yield Row("Trainer.fit with validation", f"d={d}", "/ peft", ratio(times, ["ours"], ["peft"]))


class Deep(L.LightningModule):
    """So many layers, each in a block of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(layers)))


def g_hooks(options: Options) -> Iterator[Row]:
    """All hooks of the callback in a training step that has a predecessor in its epoch."""
    for layers in options.hooks:
        module, callback = Deep(layers), LoRACallback(r=1, lora_dropout=0.1)
        inject(module, callback.config)
        trainer = L.Trainer(logger=False, enable_checkpointing=False)
        optimizer = torch.optim.SGD([module.net[0][0].lora_A])

        def step(
            callback: LoRACallback = callback,
            module: Deep = module,
            trainer: L.Trainer = trainer,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            callback.on_train_batch_start(trainer, module, None, 1)
            callback.on_before_optimizer_step(trainer, module, optimizer)
            callback.on_train_batch_end(trainer, module, None, None, 1)

        callback.on_train_epoch_start(trainer, module)
        times = interleaved({"ours": step}, options.seconds / 10, "cpu")
        yield Row("hooks of a training step", f"{layers} layers", "ours", milliseconds(times, "ours"), "ms")
