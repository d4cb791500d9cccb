"""A checkpoint saved at any moment, or because a run ends early, equals that of a run evaluated unmerged."""

from __future__ import annotations

import copy
import functools
import signal
import threading
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_lora import adapter_state_dict, is_merged, load_adapter, load_from_checkpoint
from support.covering import covering
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, weights
from support.runs.with_callback import At, Watched, assert_as_found, base_weights, lora_with_effect

KINDS = ["adapter", "merged", "full"]
ELSEWHERE = ("on_save_checkpoint", "on_load_checkpoint", "on_exception", "on_gpu")
CALLBACK_HOOKS = [name for name in dir(L.Callback) if name.startswith("on_") and name not in ELSEWHERE]
STEPS = ["training_step", "validation_step", "test_step", "predict_step", "configure_gradient_clipping"]
MODULE_HOOKS = [name for name in dir(L.LightningModule) if name.startswith("on_") and name not in ELSEWHERE] + STEPS
DATA_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
PLACES = [
    *((owner, hook) for owner in ("first", "last") for hook in CALLBACK_HOOKS),
    *(("module", h) for h in MODULE_HOOKS),
]
CASES = [(*case.values[1], case.values[0]) for case in covering(KINDS, PLACES, meet=1)]

Saved = dict[tuple[str, str], list[tuple[bool, Path]]]


class Saver:
    """Saves in hooks of the module's and of a callback first and last in the list."""

    def __init__(self, path: Path, model: Net, data: Data, kind: str) -> None:
        self.path, self.model, self.saved = path, model, defaultdict(list)
        self.first, self.last = L.Callback(), L.Callback()
        for owner, hook in [(owner, hook) for owner, hook, saved in CASES if saved == kind]:
            target = data if hook in DATA_HOOKS else getattr(self, owner, model)
            setattr(target, hook, functools.partial(self.save, (owner, hook), getattr(target, hook)))

    def save(self, place: tuple[str, str], original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, found = self.model.trainer, self.saved[place]
        file = self.path / f"{'-'.join(place)}-{len(found)}.ckpt"
        found.append((is_merged(self.model), file))
        trainer.save_checkpoint(file, weights_only=len(found) % 2 == 0)
        return original(*args, **kwargs)


@functools.cache
def saving_run(path: Path, merged_eval: bool, kind: str, saving: bool = True) -> tuple[Saved, Net]:
    torch.manual_seed(0)
    model, data, callback = Watched(), Data(1), lora_with_effect(merged_eval=merged_eval, save=kind)
    before = base_weights(model)
    saver = Saver(path, model, data, kind) if saving else None
    callbacks = [saver.first, callback, saver.last] if saver else [callback]
    trainer = fit_model(path, model, *callbacks, data=data, max_epochs=2, num_sanity_val_steps=1)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    assert_as_found(model, before)
    return saver.saved if saver else {}, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_saved_in_any_hook_equals_that_of_the_unmerged_run(folder, kind: str):
    merged, _ = saving_run(folder / "merged" / kind, True, kind)
    factored, _ = saving_run(folder / "factored" / kind, False, kind)
    for owner, hook in [(owner, hook) for owner, hook, saved in CASES if saved == kind]:
        found, expected = merged[owner, hook], factored[owner, hook]
        assert len(found) == len(expected) > 0, (owner, hook)
        assert not any(was for was, _ in expected), (owner, hook)
        if any(f"{s}_{part}" in hook for s in ("validation", "test", "predict") for part in ("step", "batch_end")):
            assert all(was for was, _ in found), (owner, hook)
        for (_, one), (_, other) in zip(found, expected, strict=True):
            files = (torch.load(file, weights_only=True) for file in (one, other))
            assert_same_tensors(*files, f"{owner} {hook}")


@pytest.mark.parametrize("merged_eval", [True, False])
def test_saving_in_every_hook_does_not_change_the_run(folder, merged_eval: bool):
    _, model = saving_run(folder / ("merged" if merged_eval else "factored") / "full", merged_eval, "full")
    _, other = saving_run(folder / "unsaved", merged_eval, "full", saving=False)
    assert model.seen == other.seen
    assert_same_tensors(weights(model), weights(other))


class Held(TorchCheckpointIO):
    """Writes when it is let."""

    def __init__(self) -> None:
        self.writes = threading.Event()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.writes.wait(timeout=30)
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize(
    ("saves", "writes", "kind"),
    [
        ("on_validation_batch_end", "on_validation_batch_end", "adapter"),
        ("on_validation_batch_end", "on_train_epoch_end", "merged"),  # saved while merged, written when that is undone
        ("on_train_batch_end", "on_validation_batch_end", "full"),  # saved before it is merged, written while it is
    ],
)
def test_a_checkpoint_that_a_thread_writes_later_is_that_of_the_moment_when_it_was_saved(
    tmp_path, saves: str, writes: str, kind: str
):
    def run(held: Held | None) -> Any:
        file = tmp_path / f"{held is not None}.ckpt"
        torch.manual_seed(0)
        save = At(saves, lambda trainer, pl_module: file.exists() or trainer.save_checkpoint(file), in_second_epoch)
        write = At(writes, lambda trainer, pl_module: held and held.writes.set(), in_second_epoch)
        plugins = {"plugins": AsyncCheckpointIO(held)} if held else {}
        model = Watched()
        before = base_weights(model)
        trainer = make_trainer(tmp_path, save, lora_with_effect(save=kind), write, max_epochs=3, **plugins)
        trainer.fit(model, Data(1))
        assert_as_found(model, before)
        return torch.load(file, weights_only=True)

    assert_same_tensors(run(Held()), run(None))


STAGES = {"fit": "validation", "validate": "validation", "test": "test", "predict": "predict"}


class TakenError(Exception):
    """The machine is gone."""


def in_second_epoch(trainer: L.Trainer) -> bool:
    return trainer.current_epoch == 1 and not trainer.sanity_checking


@pytest.mark.filterwarnings(
    "ignore:`.fit.ckpt_path=None.` was called without a model",
    "ignore:.*ckpt_path=.last.. is set, but there is no last checkpoint",
)
@pytest.mark.parametrize(("kind", "first", "fn"), covering(KINDS, [True, False], STAGES))
def test_checkpoint_saved_on_an_exception_equals_that_of_the_unmerged_run(tmp_path, kind: str, first: bool, fn: str):
    """OnExceptionCheckpoint first in the list saves a merged model; the file is that of an unmerged one."""

    def run(merged_eval: bool) -> dict[str, Any]:
        def fail(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert is_merged(pl_module) is merged_eval
            raise TakenError

        torch.manual_seed(0)
        path = tmp_path / str(merged_eval)
        model, callback = Watched(), lora_with_effect(merged_eval=merged_eval, save=kind)
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


@pytest.mark.parametrize(
    ("moment", "kind"),
    covering(["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"], KINDS, meet=1),
)
def test_a_requeued_job_goes_on_as_if_uninterrupted(tmp_path, slurm: Path, moment: str, kind: str):
    def uninterrupted(*callbacks: L.Callback) -> Net:
        torch.manual_seed(0)
        model = Watched()
        make_trainer(tmp_path / "whole", *callbacks, max_epochs=4).fit(model, Data(2))
        return model

    requeued = requeued_run(tmp_path / "plain", [], moment)
    assert_same_tensors(weights(requeued), weights(uninterrupted()))  # Lightning's own full checkpoint gives it
    model = requeued_run(tmp_path / "lora", [lora_with_effect(save=kind)], moment)
    assert_as_found(model, base_weights(Watched()))
    assert_same_tensors(weights(model), weights(uninterrupted(lora_with_effect(save=kind))))
    assert slurm.read_text().splitlines() == ["requeue 1"] * 2


class MomentumTeacher(Watched):
    """A copy of the head that no optimizer trains, and that follows it at each step."""

    def build_head(self) -> None:
        super().build_head()
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.followed = self.teacher  # its weights have two names

    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        for student, teacher in zip(self.head.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.5)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_that_training_moves_are_saved_whole_or_named(tmp_path, kind: Any):
    options: dict[str, Any] = {"save": kind, "target_modules": ["body.0"], "modules_to_save": ["head"]}
    trainer = fit_model(tmp_path, model := MomentumTeacher(), lora_with_effect(**options), max_epochs=2)
    said = r"'teacher\.weight' is frozen and has changed .* \(2 such weights\), .* save=\"full\" keeps it"
    warns = pytest.warns(UserWarning, match=said)
    with nullcontext() if kind == "full" else warns:
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer = make_trainer(tmp_path, lora_with_effect(**options), max_epochs=2)
    trainer.fit(resumed := MomentumTeacher(), Data(), ckpt_path=tmp_path / "saved.ckpt")
    assert torch.equal(resumed.head.weight, model.head.weight)
    assert torch.equal(resumed.teacher.weight, model.teacher.weight) == (kind == "full")


class Baseline(Watched):
    """A frozen copy of the adapted network, made in a setup as a rollout baseline is."""

    when = "setup"

    def setup(self, stage: str) -> None:
        if self.when == "setup" and not hasattr(self, "baseline"):
            self.baseline = copy.deepcopy(self.body).requires_grad_(False)

    def on_fit_start(self) -> None:
        if not hasattr(self, "baseline"):
            self.baseline = copy.deepcopy(self.body).requires_grad_(False)
        super().on_fit_start()

    def on_train_epoch_end(self) -> None:
        self.baseline.load_state_dict(self.body.state_dict())
        super().on_train_epoch_end()


class LateBaseline(Baseline):
    when = "fit"


@pytest.mark.parametrize("net", [Baseline, LateBaseline])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_model_with_a_frozen_copy_is_loaded_and_resumed(tmp_path, kind: Any, net: type[Baseline]):
    options: dict[str, Any] = {"save": kind, "target_modules": ["body.0"], "modules_to_save": ["head"]}
    file = tmp_path / "saved.ckpt"
    fit_model(tmp_path, model := net(), lora_with_effect(**options), max_epochs=1, saved=file)
    for loaded in (load_from_checkpoint(net, file), net()):
        load_adapter(loaded, file)
        assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(model))
    trainer = make_trainer(tmp_path, lora_with_effect(**options), max_epochs=1)
    trainer.fit(resumed := net(), Data(), ckpt_path=file)
    assert_same_tensors(adapter_state_dict(resumed), adapter_state_dict(model))
    if kind == "full" and net is Baseline:
        assert_same_tensors(resumed.baseline.state_dict(), model.baseline.state_dict())
