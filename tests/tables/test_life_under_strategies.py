"""What a user does with an adapter in and around a fit, under each strategy, compared with one device."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    read_adapter,
    save_adapter,
    unload,
)
from support.models.networks import randomise_
from support.ranks.deepspeed import gathered_by_deepspeed
from support.ranks.fsdp1 import gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import BATCHES, Plain, X, base_of, model_parallel, whole_state
from support.ranks.sharded_adapters import assert_same_bits
from support.ranks.strategies import (
    OPTIONS,
    OfFSDP2,
    OfTensorParallel,
    State,
    Watched,
    WithTrainer,
    by_tensor,
    fsdp1_by_layers,
    import_package,
    on_one_device,
    stage_2,
    stage_3,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),  # in one process
]
CLOSE = 1e-6
OF_BFLOAT16 = 0.02  # the strategies cast different tensors
EPOCHS = 2  # before a run is resumed for one more

ALONE = WithTrainer("one device", 1, 2, Watched, on_one_device)
ROWS = [
    ALONE,
    WithTrainer("ddp", 2, 2, Watched, on_one_device),
    WithTrainer("FSDP2", 2, 2, OfFSDP2, model_parallel),
    WithTrainer("tensor parallel", 2, 2, OfTensorParallel, by_tensor, tensor=2),
    WithTrainer("FSDP1, a unit for each layer", 2, 2, Watched, fsdp1_by_layers, state=gathered_by_fsdp1),
    WithTrainer("stage 2", 2, 2, Watched, stage_2, package="deepspeed"),
    WithTrainer("stage 3", 2, 2, Watched, stage_3, package="deepspeed", state=gathered_by_deepspeed),
]


# --- what is done on the ranks ---


Fit = tuple[list[float], State]  # losses of each validation, and the state after the last


@dataclass
class Life:
    """What a rank found.

    Attributes:
        base: outputs inside disable_adapter, between steps and within a validation.
        swapped: of a fit that loads another adapter between two steps.
        resumed: from last.ckpt, for one more epoch.
        best: the loss of test(ckpt_path="best"), and whether each of its batches ran merged.
        unloaded: how it was refused, or "", and the state after it.
        whole: of a fit under bf16-mixed.
        mixed: of its last epoch, resumed from last.ckpt.
    """

    base: list[torch.Tensor] = field(default_factory=list)
    fit: Fit = ([], {})
    swapped: Fit = ([], {})
    resumed: Fit = ([], {})
    best: tuple[float, list[bool]] = (0.0, [])
    unloaded: tuple[str, State] = ("", {})
    whole: Fit = ([], {})
    mixed: Fit = ([], {})


class WithoutAdapter(L.Callback):
    """Asks for the base's outputs, between two steps and in a validation."""

    def __init__(self, found: list[torch.Tensor]) -> None:
        self.found = found

    def ask(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad(), disable_adapter(module):
            self.found.append(trainer.strategy.model(X).clone())

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.ask(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        merged = is_merged(module)
        self.ask(trainer, module)
        assert is_merged(module) == merged

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.ask(trainer, module)


class Loading(L.Callback):
    """Loads another adapter between two steps."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            load_adapter(module, self.source)


def fit(
    row: WithTrainer, path: Path, *callbacks: L.Callback, source: Path | None = None, **options: Any
) -> tuple[Watched, L.Trainer, tuple[list[float], State]]:
    """Train; the first epoch is the "best". A run that is resumed has its options from the file."""
    torch.manual_seed(5 if source else 0)
    model = row.model()
    saves = ModelCheckpoint(path, filename="{epoch}", monitor="val_loss", mode="max", save_top_k=-1, save_last=True)
    lora = LoRACallback(**({} if source else OPTIONS))
    options = {"max_epochs": EPOCHS + (source is not None), "enable_checkpointing": True} | options
    trainer = row.trainer(path, lora, saves, *callbacks, **options)
    trainer.fit(model, *row.data(), ckpt_path=source)
    return model, trainer, (model.losses, row.state(trainer))


def live(row: WithTrainer, path: Path, other: Path) -> Life:
    life = Life()
    model, _, life.fit = fit(row, path / "run", WithoutAdapter(life.base))
    save_adapter(model, path / "adapter")
    _, _, life.swapped = fit(row, path / "swapped", Loading(other))

    _, trainer, life.resumed = fit(row, path / "run", source=path / "run/last.ckpt")
    fresh = row.model()
    metrics = trainer.test(fresh, row.data()[1], ckpt_path="best", verbose=False)[0]
    life.best = (metrics["test_loss"], fresh.merged)
    life.unloaded = (unloaded(fresh), row.state(trainer))

    mixed = {"precision": "bf16-mixed"}
    _, _, life.whole = fit(row, path / "whole", **mixed, max_epochs=EPOCHS + 1)
    fit(row, path / "mixed", **mixed)
    _, _, life.mixed = fit(row, path / "mixed", source=path / "mixed/last.ckpt", **mixed)
    return life


def unloaded(model: torch.nn.Module) -> str:
    try:
        unload(model)
    except LoRAError as error:
        return str(error)
    return ""


# --- compared with one device ---


@functools.cache
def folder() -> Path:
    """A folder of this process, with an adapter of other values."""
    path = Path(tempfile.mkdtemp())
    inject(other := Plain(), LoRAConfig(**OPTIONS))
    randomise_(other, 0.3)
    save_adapter(other, path / "other")
    return path


@functools.cache
def lives(row: WithTrainer) -> list[Life]:
    path = folder()
    if row.package and find_spec(row.package) is None:
        pytest.skip(f"needs the extra `{row.package}`")
    if row.ranks == 1:
        return [live(row, path / row.label, path / "other")]
    if row.package:
        world(row.ranks).run(import_package, row.package, timeout=240)
    return world(row.ranks).run(live, row, path / row.label, path / "other", timeout=240)


def assert_same_fit(found: Fit, expected: Fit, tolerance: float = CLOSE) -> None:
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, atol=tolerance, rtol=0)


@functools.cache
def uninterrupted() -> Fit:
    """Three epochs on one device, in which nothing else is done."""
    return fit(ALONE, folder() / "uninterrupted", max_epochs=EPOCHS + 1)[2]


def fingerprints_are_those_of_one_device(row: WithTrainer) -> None:
    lives(ALONE), lives(row)  # which write the files
    for file in ("adapter", "run/last.ckpt"):
        expected = read_adapter(folder() / ALONE.label / file).fingerprint
        assert len(expected) == len(Plain().state_dict())
        assert read_adapter(folder() / row.label / file).fingerprint == expected


def disable_adapter_gives_the_base_and_training_goes_on(row: WithTrainer) -> None:
    losses = uninterrupted()[0]
    with torch.no_grad():
        expected = Plain()(X)
    for life in lives(row):
        assert len(life.base) == EPOCHS * (BATCHES + 2)
        for outputs in life.base:
            torch.testing.assert_close(outputs, expected, atol=CLOSE, rtol=0)
        assert life.fit[0] == pytest.approx(losses[:EPOCHS], abs=CLOSE)


def an_adapter_loaded_between_steps_is_trained_on(row: WithTrainer) -> None:
    for life in lives(row):
        assert_same_fit(life.swapped, lives(ALONE)[0].swapped)


def last_is_resumed_like_an_uninterrupted_run(row: WithTrainer) -> None:
    losses, state = uninterrupted()
    for life in lives(row):
        assert_same_fit(life.resumed, (losses[EPOCHS:], state))


def the_best_is_tested_merged(row: WithTrainer) -> None:
    losses = uninterrupted()[0]
    assert max(losses) == losses[0] > losses[1]  # it is not what the fit ended with
    for life in lives(row):
        loss, merged = life.best
        assert loss == pytest.approx(losses[0], abs=CLOSE)
        assert merged == [True] * BATCHES


def unload_leaves_the_base_or_is_refused_by_name(row: WithTrainer) -> None:
    for life in lives(row):
        said, state = life.unloaded
        if row.label == "FSDP2":
            assert said.startswith("unload: ")
            assert "was sharded by fully_shard" in said
            state = base_of(state)
        else:
            assert said == ""
        assert_same_bits(state, whole_state(Plain()))


def bfloat16_is_near_one_device_and_resumed(row: WithTrainer) -> None:
    expected = lives(ALONE)[0].whole
    for life in lives(row):
        assert life.whole[0] == pytest.approx(expected[0], abs=OF_BFLOAT16)
        assert life.whole[0][EPOCHS] < life.whole[0][0]
        losses, state = life.whole
        assert_same_fit(life.mixed, (losses[EPOCHS:], state))


CHECKS: list[Callable[[WithTrainer], None]] = [
    fingerprints_are_those_of_one_device,
    disable_adapter_gives_the_base_and_training_goes_on,
    an_adapter_loaded_between_steps_is_trained_on,
    last_is_resumed_like_an_uninterrupted_run,
    the_best_is_tested_merged,
    unload_leaves_the_base_or_is_refused_by_name,
    bfloat16_is_near_one_device_and_resumed,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_under_each_strategy(row: WithTrainer, check: Callable[[WithTrainer], None]):
    check(row)
