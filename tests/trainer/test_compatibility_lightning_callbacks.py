"""Lightning's own callbacks beside ours in one Trainer."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import disable_adapter, is_merged
from support.runs.training import Data, Net, assert_same_tensors, outputs, weights
from support.runs.with_callback import (
    At,
    Backboned,
    Logs,
    assert_as_found,
    assert_same_numbers,
    base_weights,
    lora_with_effect,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need",
    "ignore:The dirpath has changed from",
)
TRIGGERS: dict[str, dict[str, Any]] = {
    "best": {"monitor": "val_loss", "save_top_k": 2},
    "last": {"save_last": True},
    "link": {"save_last": "link", "monitor": "epoch", "mode": "max"},
    "steps": {"every_n_train_steps": 2, "save_top_k": -1},
    "epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "train epoch end": {"save_on_train_epoch_end": True, "monitor": "step", "mode": "max", "save_top_k": -1},
    "train monitor": {"monitor": "train_loss", "save_on_train_epoch_end": True},
    "time": {"train_time_interval": timedelta(microseconds=1)},
    "weights only": {"save_weights_only": True, "monitor": "epoch", "save_top_k": -1},
}


def savers(path: Path) -> list[ModelCheckpoint]:
    return [ModelCheckpoint(path / name, "{epoch}-{step}", **options) for name, options in TRIGGERS.items()]


def all_others(path: Path, bar: L.Callback) -> list[L.Callback]:
    return [
        EarlyStopping("val_loss", patience=3),
        *savers(path),
        LearningRateMonitor(),
        ModelSummary(max_depth=-1),
        bar,
        Timer(timedelta(minutes=5)),
        GradientAccumulationScheduler({0: 1, 1: 2}),
    ]


def fit(path: Path, model: Net, callbacks: list[L.Callback], epochs: int = 4, resume: Path | None = None) -> L.Trainer:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=CSVLogger(path),
        default_root_dir=path,
        callbacks=callbacks,
    )
    trainer.fit(model, Data(), ckpt_path=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(("bar", "first"), [(RichProgressBar, True), (TQDMProgressBar, False)])
def test_all_callbacks_in_one_trainer_give_the_run_evaluated_unmerged(tmp_path, first: bool, bar: type[L.Callback]):
    models, files = {}, {}
    for merged_eval in (True, False):
        path = tmp_path / str(merged_eval)
        models[merged_eval] = model = Logs()
        before = base_weights(model)
        others, ours = all_others(path, bar()), lora_with_effect(merged_eval=merged_eval)
        fit(path, model, [ours, *others] if first else [*others, ours])
        assert_as_found(model, before)
        files[merged_eval] = {str(file.relative_to(path)): file for file in path.rglob("*.ckpt")}
    assert_same_numbers(models[True].seen, models[False].seen)
    assert_same_tensors(weights(models[True]), weights(models[False]))
    assert {Path(name).parts[0] for name in files[True]} == set(TRIGGERS)
    always = {name for name in files[True] if not name.startswith(("time", "best", "link"))}
    assert always
    assert always <= files[False].keys()
    for name in always:
        one, other = (torch.load(files[m][name], weights_only=True) for m in (True, False))
        assert not [
            key
            for key in one["state_dict"]
            if key.startswith(("head.weight", "body.0.weight", "body.3.")) and "lora" not in key
        ]
        for checkpoint in (one, other):
            checkpoint.pop("callbacks", None)  # paths, and metrics that agree up to rounding
        assert_same_tensors(one, other)


def fit_nothing(path: Path, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, default_root_dir=path, callbacks=callbacks)


FREEZING = [
    "ignore:lightning_lora. base parameters were unfrozen",
    "ignore:The provided params to be frozen already exist",
    "ignore:lightning_lora. the adapters of [0-9]+ layers are frozen",
]


@pytest.mark.slow
@pytest.mark.filterwarnings(*FREEZING)
@pytest.mark.parametrize(("first", "kind"), [(True, "adapter"), (False, "merged"), (True, "full")])
def test_backbone_finetuning_trains_saves_and_resumes_the_unfrozen_base(tmp_path, first: bool, kind: str):
    """From epoch 2 on the backbone's base is trained too; what is saved holds it."""

    def run(path: Path, merged_eval: bool = True, resume: Path | None = None) -> tuple[Net, L.Trainer]:
        model = Backboned()
        tune = BackboneFinetuning(2, backbone_initial_ratio_lr=1.0, should_align=False)
        ours = lora_with_effect(save=kind, merged_eval=merged_eval)
        keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1, monitor="val_loss")
        trainer = fit(path, model, [ours, tune, keep] if first else [tune, ours, keep], resume=resume)
        return model, trainer

    merged, trainer = run(tmp_path / "merged")
    factored, _ = run(tmp_path / "factored", False)
    assert_same_numbers(merged.seen, factored.seen)
    assert_same_tensors(weights(merged), weights(factored))
    assert not is_merged(merged)
    assert not torch.equal(merged.body[3].weight, Net().body[3].weight)
    assert torch.equal(merged.head.weight, Net().head.weight)
    for epoch in (0, 1):  # later, Lightning itself resumes with the backbone frozen
        resumed, _ = run(tmp_path / f"resumed {epoch}", resume=tmp_path / f"merged/epoch={epoch}.ckpt")
        assert_same_tensors(weights(resumed), weights(merged))
    scores = {Path(path).stem: score.item() for path, score in trainer.checkpoint_callback.best_k_models.items()}
    assert len(scores) == 4
    for epoch, logged in scores.items():  # also those from before the unfreezing, in the Trainer that went on
        for model, tester in ((Backboned(), fit_nothing(tmp_path, [lora_with_effect(save=kind)])), (merged, trainer)):
            found = tester.test(model, Data(), ckpt_path=tmp_path / f"merged/{epoch}.ckpt", verbose=False)
            assert found[0]["test_loss"] == pytest.approx(logged, rel=1e-5)
    with disable_adapter(merged):
        assert_same_tensors(outputs(merged), outputs(Net()))


@pytest.mark.filterwarnings(*FREEZING)
@pytest.mark.parametrize(("first", "hook"), [(True, "on_fit_start"), (False, "on_train_epoch_start")])
def test_a_weight_unfrozen_between_epochs_has_its_first_value_kept(tmp_path, first: bool, hook: str):
    unfreeze = At(hook, lambda trainer, module: module.head.weight.requires_grad_(True))
    model, ours = Logs(), lora_with_effect()
    fit(tmp_path, model, [ours, unfreeze] if first else [unfreeze, ours], epochs=2)
    assert not torch.equal(model.head.weight, Net().head.weight)
    with disable_adapter(model):
        assert_same_tensors(outputs(model), outputs(Net()))
