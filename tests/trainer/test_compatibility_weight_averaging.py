"""Weight averaging beside the callback: right metrics, Lightning's own weights, resuming, small checkpoints."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import is_merged
from support.covering import covering
from support.runs.lightning_versions import WeightAveraging, averaging, weight_averaging
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, weights
from support.runs.with_callback import (
    SWAPPERS,
    TARGETS,
    At,
    base_weights,
    lora_with_effect,
    reference_loss,
    swa,
)


class OwnAverage(L.Callback):
    """Averages a whole state dict in float64 whenever the swapper does, and notes the loss of each validation."""

    def __init__(self, swapper: WeightAveraging, decay: float | None) -> None:
        self.swapper, self.decay = swapper, decay
        self.average: dict[str, torch.Tensor] = {}
        self.count, self.step = 0, 0
        self.expected: list[float] = []
        self.logged: list[float] = []
        self.unaveraged: list[float] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = {name: value.double() for name, value in weights(pl_module).items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > self.step and self.swapper.should_update(step_idx=trainer.global_step - 1):
            self.update(pl_module)
            self.step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.swapper.should_update(epoch_idx=trainer.current_epoch):
            self.update(pl_module)

    def update(self, module: nn.Module) -> None:
        for name, value in weights(module).items():
            share = 1.0 if self.count == 0 else 1 / (self.count + 1) if self.decay is None else 1 - self.decay
            self.average[name] = (1 - share) * self.average[name] + share * value.double()
        self.count += 1
        if not self.swapper._use_buffers:  # then they are copied
            self.average |= {name: buffer.detach().double() for name, buffer in module.named_buffers()}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.expected.append(reference_loss(self.average))
        self.unaveraged.append(reference_loss(weights(pl_module)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged.append(trainer.callback_metrics["val_loss"].item())


@weight_averaging
@pytest.mark.parametrize(("interval", "merged_eval", "name"), covering([1.0, 2], [True, False], SWAPPERS, meet=1))
def test_validation_sees_the_averaged_adapter(tmp_path, name: str, interval: float, merged_eval: bool):
    swapper = SWAPPERS[name]()
    own = OwnAverage(swapper, None if name.startswith("mean") else 0.8 if name == "ema" else 0.5)
    was = []
    watch = At("on_validation_batch_end", lambda trainer, pl_module: was.append(is_merged(pl_module)))
    trainer = make_trainer(
        tmp_path,
        own,
        lora_with_effect(merged_eval=merged_eval),
        swapper,
        watch,
        max_epochs=4,
        val_check_interval=interval,
    )
    trainer.fit(Net(), Data())
    assert was == [merged_eval] * 3 * 4
    assert own.logged == pytest.approx(own.expected, rel=1e-5)
    assert max(abs(a - b) for a, b in zip(own.logged, own.unaveraged, strict=True)) > 1e-3


@pytest.mark.parametrize(("norm", "merged_eval"), [(True, True), (False, False)])
def test_stochastic_averaging_gives_the_mean_of_the_factors_and_leaves_the_base(
    tmp_path, norm: bool, merged_eval: bool
):
    """The mean of the factors at the starts of the last epochs; the base bit for bit."""
    model, sums = Plainer() if not norm else Net(), []
    base = base_weights(model)
    own = At(
        "on_train_epoch_start",
        lambda trainer, pl_module: sums.append(weights(pl_module)),
        lambda trainer: 1 <= trainer.current_epoch < 4,
    )
    trainer = fit_model(tmp_path, model, own, lora_with_effect(merged_eval=merged_eval), swa(), max_epochs=4)
    assert_same_tensors(base_weights(model), base)
    for name in (f"{layer}.{leaf}" for layer in TARGETS for leaf in ("lora_A", "lora_B")):
        expected = torch.stack([state[name].double() for state in sums]).mean(0)
        torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
    logged = trainer.validate(model, Data(), verbose=False)[0]["val_loss"]
    if norm:
        assert logged == pytest.approx(reference_loss(model.state_dict()), rel=1e-5)


class Plainer(Net):
    """Without BatchNorm, for which StochasticWeightAveraging adds an epoch."""

    def build_body(self) -> None:
        super().build_body()
        self.body[1] = nn.Identity()


class OneTrained(Net):
    """Frozen but for one number that is not used for anything else, so that Lightning has something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.number = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.number


@pytest.mark.slow
@pytest.mark.parametrize("name", [*averaging(["mean", "ema"]), "swa"])
def test_the_base_ends_as_lightning_alone_leaves_a_frozen_one(tmp_path, name: str):
    """The average of equal numbers is not always that number; what moves, Lightning moves."""
    ours, alone = Net(), OneTrained()
    make = swa if name == "swa" else SWAPPERS[name]
    make_trainer(tmp_path, lora_with_effect(), make(), max_epochs=8).fit(ours, Data())
    make_trainer(tmp_path, make(), max_epochs=8).fit(alone, Data())
    frozen = base_weights(alone)
    del frozen["number"]
    assert_same_tensors(base_weights(ours), frozen)
