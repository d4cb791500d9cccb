"""Courses, faults and checkpoints of runs for which the callback one writes first is wrong, and ours is right."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_lora import LoRACallback, LoRAError, load_from_checkpoint
from lightning_lora.nn.lora_layer import LoRALayer
from support.lightning_versions import EMAWeightAveraging, averaging
from support.naive import (
    OPTIONS,
    Damage,
    Make,
    NaiveCallback,
    Peft,
    SavesAll,
    SavesItsConfig,
    assert_harms_naive_alone,
    distance,
    fails,
    fit,
)
from support.runs import TARGETS, At, BrokenError, OwnAverage, base_weights
from support.training import BuiltInConfigureModel, BuiltInSetup, Data, Net, make_trainer, outputs, weights


def fail(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    raise BrokenError


# --- faults and saves while merged ---


def interrupt(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    raise KeyboardInterrupt


def exception_in_validation(make: Make, path: Path) -> float:
    """The model stays merged, and the next fit bakes the delta in."""
    return broken_off(make, path, fail, BrokenError)


def ctrl_c_in_validation(make: Make, path: Path) -> float:
    """Lightning ends the program, but a notebook goes on."""
    return broken_off(make, path, interrupt, SystemExit)


def broken_off(make: Make, path: Path, act: Any, ends_as: type[BaseException]) -> float:
    model, callback = Net(), make(**OPTIONS)
    with pytest.raises(ends_as):
        fit(path, model, callback, At("on_validation_batch_end", act, lambda trainer: trainer.current_epoch == 1))
    with suppress(RuntimeError):  # a model left merged has nothing to train
        fit(path, model.train(), callback)
    return distance(base_weights(model), base_weights(Net()))


def saved_base(path: Path) -> float:
    """How far the base in a full checkpoint is from the base."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return distance(state, {name: Net().get_parameter(name) for name in (f"{target}.weight" for target in TARGETS)})


def on_exception_checkpoint(make: Make, path: Path) -> float:
    keep = OnExceptionCheckpoint(path)
    hook = At("on_validation_batch_end", fail, lambda trainer: trainer.current_epoch == 1)
    with pytest.raises(BrokenError):
        fit(path, Net(), make(**OPTIONS), keep, hook)
    return saved_base(Path(keep.ckpt_path))


def slurm_requeue(make: Make, path: Path) -> float:
    """Lightning's handler saves at once, whatever is going on."""

    def handle(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer._signal_connector._slurm_sigusr_handler_fn(10, None)

    hook = At("on_validation_batch_end", handle, lambda trainer: trainer.current_epoch == 2)
    fit(path, Net(), make(**OPTIONS), hook, plugins=[SLURMEnvironment()])
    return saved_base(path / "hpc_ckpt_1.ckpt")


def saved_inside_validation(make: Make, path: Path) -> float:
    save = At("on_validation_batch_end", lambda trainer, _: trainer.save_checkpoint(path / "a.ckpt"))
    fit(path, Net(), make(**OPTIONS), save)
    return saved_base(path / "a.ckpt")


# --- what is saved, and what comes back ---


def weights_only_checkpoint(make: Make, path: Path) -> float:
    """Calls no hook of a callback, so that the base is in it."""
    fit(path, Net(), make(**OPTIONS), ModelCheckpoint(path, "a", save_weights_only=True))
    return float("head.weight" in torch.load(path / "a.ckpt", weights_only=True)["state_dict"])


def only_plain_types(make: Make, path: Path) -> float:
    fit(path, Net(), make(**OPTIONS)).save_checkpoint(path / "a.ckpt")
    return fails(lambda: torch.load(path / "a.ckpt", weights_only=True), Exception)


def resume(path: Path, model: Net, make: Make) -> None:
    trainer = make_trainer(path, make(**OPTIONS), max_epochs=5)
    trainer.fit(model, Data(), ckpt_path=path / "a.ckpt")


def strict_resume(make: Make, path: Path) -> float:
    """The strict load comes before a callback's on_load_checkpoint."""
    fit(path, Net(), make(**OPTIONS)).save_checkpoint(path / "a.ckpt")
    return fails(lambda: resume(path, Net(), make), RuntimeError)


class TrainableOnly(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


def lenient_resume(make: Make, path: Path) -> float:
    """With strict_loading=False the factors come back alone, without BatchNorm's statistics."""
    distances = []
    for i, model_class in enumerate((Net, TrainableOnly)):  # an optimizer of all parameters, and of the trainable ones
        whole, resumed = model_class(), model_class()
        fit(path / str(i), whole, make(**OPTIONS)).save_checkpoint(path / str(i) / "a.ckpt")
        resumed.strict_loading = whole.strict_loading = False
        resume(path / str(i), whole, make)
        resume(path / str(i), resumed, make)
        straight = model_class()
        fit(path / str(i), straight, make(**OPTIONS), max_epochs=5)
        distances.append(distance(weights(resumed), weights(straight)))
    return max(distances)


def batch_norm_statistics(make: Make, path: Path) -> float:
    model = Net()
    fit(path, model, make(**OPTIONS)).save_checkpoint(path / "a.ckpt")
    state = torch.load(path / "a.ckpt", weights_only=True)["state_dict"]
    again = Net()
    make_trainer(path, make(**OPTIONS)).validate(again, Data(), verbose=False)  # injects
    again.load_state_dict(state, strict=False)
    return (outputs(again) - outputs(model)).abs().max().item()


def load_from_checkpoint_gives_the_base(make: Make, path: Path) -> float:
    """Lightning's own, with strict=False as its error asks, silently drops every factor."""
    model = Net()
    fit(path, model, make(**OPTIONS)).save_checkpoint(path / "a.ckpt")
    if make is LoRACallback:
        return (outputs(load_from_checkpoint(Net, path / "a.ckpt")) - outputs(model)).abs().max().item()
    loaded = Net.load_from_checkpoint(path / "a.ckpt", strict=False)
    return (outputs(loaded) - outputs(model)).abs().max().item()


def renamed_keys(make: Make, path: Path) -> float:
    """A base checkpoint that is loaded after injection, with strict=False because of the factors."""
    model, other = Net(), Net(seed=7)
    make_trainer(path, make(**OPTIONS)).validate(model, Data(), verbose=False)
    model.load_state_dict(other.state_dict(), strict=False)
    weight = model.head.weight if isinstance(model.head, LoRALayer) else model.head.get_base_layer().weight
    return (weight - other.head.weight).abs().max().item()


def learning_rate_finder(make: Make, path: Path) -> float:
    finder = LearningRateFinder(num_training_steps=3, attr_name="lr", update_attr=False)
    return fails(lambda: fit(path, Net(), make(**OPTIONS), finder), RuntimeError)


def ema_resume(make: Make, path: Path) -> float:
    average = {"decay": 0.5}
    fit(path, Net(), make(**OPTIONS), EMAWeightAveraging(**average)).save_checkpoint(path / "a.ckpt")
    trainer = make_trainer(path, make(**OPTIONS), EMAWeightAveraging(**average), max_epochs=5)
    return fails(lambda: trainer.fit(Net(), Data(), ckpt_path=path / "a.ckpt"), RuntimeError)


# --- the order of events ---


def ema_validation(make: Make, path: Path) -> float:
    """It swaps weights after on_validation_start, so that a model merged there is evaluated without the adapter."""
    swapper = EMAWeightAveraging(decay=0.8)
    own = OwnAverage(swapper, 0.8)
    fit(path, Net(), own, make(**OPTIONS | {"lora_alpha": 4}), swapper)
    return max(abs(a - b) for a, b in zip(own.logged, own.expected, strict=True))


def averaging_listed_first(make: Make, path: Path) -> float:
    """It copies the model before there are factors; to be told the order is as good as to be right."""
    try:
        fit(path, Net(), EMAWeightAveraging(), make(**OPTIONS))
    except LoRAError as error:
        return float("must come after LoRACallback" not in str(error))
    except RuntimeError:
        return 1.0
    return 0.0


def built_late(make: Make, path: Path, model: Net) -> float:
    try:
        fit(path, model, make(**OPTIONS))
    except LoRAError:
        return 1.0
    return float(not isinstance(model.head, LoRALayer) or not model.head.lora_B.any())


def built_in_setup(make: Make, path: Path) -> float:
    """A callback's setup comes before the module's."""
    return built_late(make, path, BuiltInSetup())


def built_in_configure_model(make: Make, path: Path) -> float:
    return built_late(make, path, BuiltInConfigureModel())


class Captured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.captured = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.captured, lr=0.1)


def parameters_captured_in_init(make: Make, path: Path) -> float:
    """Nothing is trained, without a word; to be told is as good as to be right."""
    model = Captured()
    try:
        fit(path, model, make(**OPTIONS), gradient_clip_val=None)
    except LoRAError as error:
        return float("no optimizer holds" not in str(error))
    return float(not model.head.lora_B.any())


def full(**options: Any) -> L.Callback:
    return LoRACallback(save="full", **options)


CASES: list[tuple[Damage, Make, Make]] = [
    (exception_in_validation, NaiveCallback, LoRACallback),
    (ctrl_c_in_validation, NaiveCallback, LoRACallback),
    (on_exception_checkpoint, SavesAll, full),
    (slurm_requeue, SavesAll, full),
    (saved_inside_validation, SavesAll, full),
    (weights_only_checkpoint, NaiveCallback, LoRACallback),
    (only_plain_types, SavesItsConfig, LoRACallback),
    (strict_resume, NaiveCallback, LoRACallback),
    (lenient_resume, NaiveCallback, LoRACallback),
    (batch_norm_statistics, NaiveCallback, LoRACallback),
    (load_from_checkpoint_gives_the_base, NaiveCallback, LoRACallback),
    (renamed_keys, Peft, LoRACallback),
    (learning_rate_finder, NaiveCallback, LoRACallback),
    (built_in_setup, NaiveCallback, LoRACallback),
    (built_in_configure_model, NaiveCallback, LoRACallback),
    (parameters_captured_in_init, NaiveCallback, LoRACallback),
]
WITH_AVERAGING: list[tuple[Damage, Make, Make]] = [
    (ema_resume, NaiveCallback, LoRACallback),
    (ema_validation, NaiveCallback, LoRACallback),
    (averaging_listed_first, NaiveCallback, LoRACallback),
]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`.fit.ckpt_path=None.` was called without a model",
    "ignore:.*ckpt_path=.last.. is set, but there is no last checkpoint",
    "ignore:Found keys that are (not )?in the model state dict but",
    "ignore:lightning_lora. entries that name nothing .*target_modules. 'head'",  # the naive one is too early
)
@pytest.mark.parametrize(
    ("damage", "naive", "ours"),
    [*CASES, *averaging(WITH_AVERAGING)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_run_harms_the_naive_callback_and_not_ours(tmp_path, monkeypatch, damage: Damage, naive: Make, ours: Make):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    monkeypatch.setattr("lightning.pytorch.plugins.environments.SLURMEnvironment.detect", lambda: False)
    assert_harms_naive_alone(damage, naive, ours, tmp_path)
