"""Checkpoints that are saved because a run ends early: on an exception, and when SLURM takes the machine back."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from comparing import At, Watched, assert_as_found, base_weights, lora
from helpers import Data, Net, assert_same_tensors, make_trainer, weights
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_lora import is_merged

STAGES = {"fit": "validation", "validate": "validation", "test": "test", "predict": "predict"}
KINDS = ["adapter", "merged", "full"]


class TakenError(Exception):
    """The machine is gone."""


def in_second_epoch(trainer: L.Trainer) -> bool:
    return trainer.current_epoch == 1 and not trainer.sanity_checking


@pytest.mark.filterwarnings(
    "ignore:`.fit.ckpt_path=None.` was called without a model:UserWarning",
    "ignore:.*ckpt_path=.last.. is set, but there is no last checkpoint:UserWarning",
)
@pytest.mark.parametrize("fn", STAGES)
@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_on_an_exception(tmp_path, kind: str, first: bool, fn: str):
    """OnExceptionCheckpoint first in the list saves a merged model; the file is that of an unmerged one."""

    def run(merged_eval: bool) -> dict[str, Any]:
        def fail(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert is_merged(pl_module) is merged_eval
            raise TakenError

        torch.manual_seed(0)
        path = tmp_path / str(merged_eval)
        model, callback = Watched(), lora(merged_eval=merged_eval, save=kind)
        before = base_weights(model)
        make_trainer(path, callback).fit(model, Data(2))
        hook = At(f"on_{STAGES[fn]}_batch_end", fail, lambda trainer: fn != "fit" or in_second_epoch(trainer))
        keep = OnExceptionCheckpoint(path)
        trainer = make_trainer(path, *([keep, callback] if first else [callback, keep]), hook, max_epochs=3)
        with pytest.raises(TakenError):
            getattr(trainer, fn)(model, Data(2))
        assert_as_found(model, before)
        return torch.load(keep.ckpt_path, weights_only=True)

    assert_same_tensors(run(True), run(False))


@pytest.fixture
def slurm(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that may be requeued, and the log of the requests to do so."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requests\n')
    scontrol.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    return tmp_path / "requests"


def requeued_run(path: Path, callbacks: list[L.Callback], moment: str) -> Net:
    """Two Trainers, as in two jobs: the first is signalled in the second epoch and dies, the second goes on."""

    def signalled(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.raise_signal(signal.SIGUSR1)
        raise TakenError

    hook = At(moment, signalled, in_second_epoch)
    options = {"max_epochs": 4, "plugins": [SLURMEnvironment()]}
    torch.manual_seed(0)
    with pytest.raises(TakenError):
        make_trainer(path, *callbacks, hook, **options).fit(Watched(), Data(2))
    torch.manual_seed(1)
    model = Watched()
    make_trainer(path, *callbacks, **options).fit(model, Data(2))
    assert model.seen[0][0] == "train"
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_a_requeued_job_goes_on_as_if_uninterrupted(tmp_path, slurm: Path, moment: str, kind: str):
    def uninterrupted(*callbacks: L.Callback) -> Net:
        torch.manual_seed(0)
        model = Watched()
        make_trainer(tmp_path / "whole", *callbacks, max_epochs=4).fit(model, Data(2))
        return model

    requeued = requeued_run(tmp_path / "plain", [], moment)
    assert_same_tensors(weights(requeued), weights(uninterrupted()))  # Lightning's own full checkpoint gives it
    model = requeued_run(tmp_path / "lora", [lora(save=kind)], moment)
    assert_as_found(model, base_weights(Watched()))
    assert_same_tensors(weights(model), weights(uninterrupted(lora(save=kind))))
    assert slurm.read_text().splitlines() == ["requeue 1"] * 2
