"""A run that diverges: validation goes on unmerged, callbacks decide, and the run ends as without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_lora import LoRAError, is_merged, load_from_checkpoint
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, weights
from support.runs.with_callback import At, Steps, assert_as_found, base_weights, lora, lora_with_effect, run

UNMERGED = r"unmerged.*merge: layer 'body\.[03]': W \+ s \* B @ A is not finite"
diverges = pytest.mark.filterwarnings("ignore:LoRACallback. this validation runs unmerged")


def diverging(path: Path, model: Net, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, EarlyStopping]:
    """Fit with a learning rate beyond anything, until a loss is not finite."""
    stopping = EarlyStopping("val_loss", check_finite=True, patience=10)
    trainer = fit_model(path, model, *callbacks, stopping, max_epochs=9, **options)
    return trainer, stopping


def test_early_stopping_ends_a_diverging_run_as_it_does_without_lora(tmp_path):
    model, alone = Steps(lr=1e30), Net(lr=1e30)
    base = base_weights(model)
    with pytest.warns(UserWarning, match=UNMERGED):
        trainer, stopping = diverging(tmp_path, model, lora(), val_check_interval=2)
    expected, stopping_alone = diverging(tmp_path, alone, val_check_interval=2)
    assert not torch.isfinite(trainer.callback_metrics["val_loss"])
    ended, ended_alone = (getattr(s, "stopping_reason", s.stopped_epoch) for s in (stopping, stopping_alone))
    assert ended == ended_alone  # the first versions of Lightning tell the epoch alone
    assert trainer.should_stop
    assert trainer.state.finished
    assert expected.state.finished
    assert trainer.current_epoch < 9
    assert_as_found(model, base)


def test_a_validation_that_cannot_merge_is_unmerged_to_its_end_and_the_next_one_merges_again(tmp_path):
    """B of one layer is broken in epoch 0, and whole again in epoch 1."""

    def set_b(value: float) -> Any:
        return lambda trainer, pl_module: pl_module.body[3].lora_B.data[0].fill_(value)

    model = Steps()
    base = base_weights(model)
    callbacks = [
        At("on_validation_start", set_b(torch.nan), lambda trainer: trainer.current_epoch == 0),
        lora_with_effect(),
        At("on_train_epoch_start", set_b(0.0), lambda trainer: trainer.current_epoch == 1),
    ]
    with pytest.warns(UserWarning, match=r"unmerged.*'body\.3'") as caught:
        make_trainer(tmp_path, *callbacks, max_epochs=2).fit(model, Data())
    assert sum("runs unmerged" in str(warning.message) for warning in caught) == 1
    assert [merged for name, merged in model.seen if name == "validation_step"] == [False] * 3 + [True] * 3
    assert_as_found(model, base)


def test_a_sanity_check_that_cannot_merge_runs_unmerged(tmp_path):
    model = Steps()
    with torch.no_grad():
        model.body[0].weight[0] = torch.inf
    with pytest.warns(UserWarning, match=r"unmerged.*'body\.0'"):
        make_trainer(tmp_path, lora(), num_sanity_val_steps=2, limit_train_batches=0).fit(model, Data())
    assert model.seen == [("validation_step", False)] * 2


@UNTRAINED_NOTICE
def test_an_evaluation_outside_of_fit_is_refused(tmp_path):
    model = Net()
    with torch.no_grad():
        model.body[0].weight[0] = torch.inf
    with pytest.raises(LoRAError, match=r"merge: layer 'body\.0': .*not finite"):
        run(make_trainer(tmp_path, lora()), "test", model)
    assert not is_merged(model)


def test_an_overflow_of_the_weights_dtype_is_evaluated_unmerged_with_finite_losses(tmp_path):
    """W' is beyond float16 although W, the adapter and its input, which is zero, are not."""

    def grow(trainer: L.Trainer, pl_module: Any) -> None:
        for parameter in (pl_module.body[3].weight, pl_module.body[3].bias, pl_module.body[3].lora_B):
            parameter.data.zero_()
        for factor in (pl_module.head.lora_A, pl_module.head.lora_B):
            factor.data.fill_(1e4)

    trainer = make_trainer(tmp_path, At("on_validation_start", grow), lora(), precision="16-true")
    with pytest.warns(UserWarning, match=r"unmerged.*'head'.*not finite"):
        trainer.fit(Net(), Data())
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


@pytest.mark.slow
@diverges
def test_checkpoints_of_the_best_epochs_are_saved_and_the_run_ends_cleanly(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    breaks = At(
        "on_train_batch_end",
        lambda trainer, pl_module: pl_module.body[3].lora_B.data.fill_(torch.nan),
        lambda trainer: trainer.current_epoch == 2,
    )
    trainer, _ = diverging(tmp_path, Net(), lora(save="merged"), breaks, best)
    assert trainer.current_epoch == 3
    loaded = load_from_checkpoint(Net, best.best_model_path)
    assert all(tensor.isfinite().all() for tensor in weights(loaded).values())


@diverges
def test_a_checkpoint_of_a_diverged_run_holds_what_lightning_would_save(tmp_path):
    model = Net(lr=1e30)
    diverging(tmp_path, model, lora(save="full"), ModelCheckpoint(tmp_path, filename="last"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not all(tensor.isfinite().all() for tensor in state.values())
    live = weights(model)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, live[name], rtol=0, atol=0, equal_nan=True)


@diverges
def test_a_merged_checkpoint_of_a_diverged_run_is_refused_with_the_remedy(tmp_path):
    model = Net(lr=1e30)
    base = base_weights(model)
    with pytest.raises(LoRAError, match=r"'body\.[03]'.*not finite.*save=\"adapter\""):
        diverging(tmp_path, model, lora(save="merged"), ModelCheckpoint(tmp_path, filename="last"))
    assert_as_found(model, base)
    assert_same_tensors(base_weights(model), base)
