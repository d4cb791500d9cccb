"""merge_after_fit: plain layers with merged weights at the end of the fit, and what follows."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, is_merged, load_from_checkpoint, merge_and_unload
from lightning_lora.model.injection import Injection
from lightning_lora.names import MERGED_FOR_GOOD
from lightning_lora.nn.lora_layer import LoRALayer
from lightning_lora.trainer.after_fit import refuse_merge_after_fit
from lightning_lora.trainer.run_hooks import close_fit
from lightning_lora.trainer.run_state import run_of
from support.covering import covering
from support.models.pretrained import Lit, answer, save_body, token_loader
from support.runs.lightning_versions import PLAIN_TYPES_ONLY, WeightAveraging, weight_averaging
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, outputs, weights
from support.runs.with_callback import At, BrokenError, lora_with_effect


def fit(path: Path, *callbacks: L.Callback, model: Net | None = None, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net() if model is None else model
    make_trainer(path, *callbacks, **{"max_epochs": 2} | options).fit(model, Data())
    return model


def assert_plain(model: nn.Module) -> None:
    assert not [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    assert weights(model).keys() == weights(Net()).keys()
    traces = {name for module in model.modules() for name in vars(module) if "lora" in name}
    patches = {name for name in vars(model) if callable(vars(model)[name])} - set(vars(Net()))
    assert not traces | patches
    assert all(type(module).__module__.startswith(("torch.", "support.")) for module in model.modules())


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALayer) for module in model.modules())


def test_save_pretrained_after_fit_saves_what_was_trained(tmp_path):
    body = save_body(tmp_path / "body")
    module = Lit(body)
    callback = LoRACallback(r=2, target_modules=["query"], task_type="SEQ_CLS", merge_after_fit=True)
    make_trainer(tmp_path, callback).fit(module, token_loader())
    module.model.save_pretrained(tmp_path / "tuned")  # warnings are errors
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(answer(again), answer(module))


@pytest.mark.parametrize(
    "averaging",
    [pytest.param(WeightAveraging, id="averaged", marks=weight_averaging), pytest.param(None, id="as it is")],
)
def test_fit_leaves_the_plain_model_that_merging_it_at_its_end_gives(tmp_path, averaging):
    by_hand, by_itself = (
        fit(tmp_path / str(on), lora_with_effect(merge_after_fit=on), *([averaging()] if averaging else []))
        for on in (False, True)
    )
    assert_plain(by_itself)
    assert not torch.equal(outputs(by_itself), outputs(Net()))
    merge_and_unload(by_hand)
    assert_same_tensors(weights(by_itself), weights(by_hand))
    assert all(parameter.requires_grad for parameter in by_itself.parameters())


# --- evaluation after the fit ---


@pytest.mark.parametrize(("same_callback", "stage"), covering([True, False], ["validate", "test", "predict"], meet=1))
def test_evaluation_after_the_fit_takes_the_model_as_it_is_and_leaves_it_so(tmp_path, stage: str, same_callback: bool):
    callback = lora_with_effect(merge_after_fit=True)
    model = fit(tmp_path, callback)
    before = weights(model)
    plain = Net()
    plain.load_state_dict(before)
    evaluating = callback if same_callback else lora_with_effect()
    found = getattr(make_trainer(tmp_path, evaluating), stage)(model, Data())
    assert_same_tensors(found, getattr(make_trainer(tmp_path), stage)(plain, Data()))
    assert_same_tensors(weights(model), before)
    assert_plain(model)


def best_and_after(path: Path, save: str, merge_after_fit: bool = True) -> tuple[Net, L.Trainer]:
    """A fit whose checkpoint is of the first epoch."""
    model = Net()
    saver = ModelCheckpoint(path, monitor="val_loss", mode="max")
    trainer = make_trainer(path, lora_with_effect(merge_after_fit=merge_after_fit, save=save), saver, max_epochs=3)
    torch.manual_seed(0)
    trainer.fit(model, Data())
    assert saver.best_model_score is not None
    assert saver.best_model_score > 1.01 * trainer.callback_metrics["val_loss"]
    return model, trainer


def test_the_best_merged_checkpoint_is_tested_with_its_own_numbers(tmp_path):
    model, trainer = best_and_after(tmp_path, "merged")
    best: Any = trainer.checkpoint_callback
    (found,) = trainer.test(model, Data(), ckpt_path="best", verbose=False, **PLAIN_TYPES_ONLY)
    assert found["test_loss"] == pytest.approx(best.best_model_score.item(), rel=1e-5)
    assert_plain(model)


@pytest.mark.slow
def test_a_checkpoint_that_needs_the_base_is_refused_with_the_remedy_and_the_model_stays(tmp_path):
    model, trainer = best_and_after(tmp_path, "adapter")
    before = weights(model)
    with pytest.raises(LoRAError, match=r"of kind 'adapter' .*merge_after_fit has .*save='merged'"):
        trainer.test(model, Data(), ckpt_path="best", verbose=False, **PLAIN_TYPES_ONLY)
    assert_same_tensors(weights(model), before)
    make_trainer(tmp_path, lora_with_effect()).test(model, Data(), verbose=False)
    assert_plain(model)
    fresh = load_from_checkpoint(Net, trainer.checkpoint_callback.best_model_path)  # the remedy
    (found,) = make_trainer(tmp_path, lora_with_effect()).test(fresh, Data(), verbose=False)
    assert found["test_loss"] == pytest.approx(trainer.checkpoint_callback.best_model_score.item(), rel=1e-5)


def test_a_second_fit_goes_on_from_the_merged_weights_and_merges_again(tmp_path):
    callback = lora_with_effect(merge_after_fit=True, init_lora_weights=True)
    model = fit(tmp_path, callback)
    once = weights(model)
    make_trainer(tmp_path, callback, max_epochs=0).fit(model, Data())
    assert_same_tensors(weights(model), once)
    merged: list[bool] = []
    noting = At("on_validation_batch_end", lambda trainer, module: merged.append(is_merged(module)))
    fit(tmp_path, callback, noting, model=model)
    assert merged
    assert all(merged)
    assert_plain(model)
    assert not torch.equal(weights(model)["body.0.weight"], once["body.0.weight"])


def test_a_finished_run_that_is_resumed_is_merged_too(tmp_path):
    first = Net()
    fit_model(tmp_path, first, lora_with_effect(), saved=tmp_path / "a.ckpt", max_epochs=2)
    model = Net()
    again = make_trainer(tmp_path, lora_with_effect(merge_after_fit=True), max_epochs=2)
    again.fit(model, Data(), ckpt_path=tmp_path / "a.ckpt", **PLAIN_TYPES_ONLY)
    assert_plain(model)
    assert_same_tensors(weights(model), weights(merge_and_unload(first)))


# --- fits that do not come to their end ---


def test_a_fit_that_fails_and_a_finder_leave_an_adapted_model(tmp_path):
    def fail(trainer: Any, pl_module: Any) -> None:
        raise BrokenError

    callback, model = lora_with_effect(merge_after_fit=True), Net()
    with pytest.raises(BrokenError):
        fit(tmp_path, callback, At("on_train_epoch_end", fail), model=model)
    assert is_adapted(model)
    trainer = make_trainer(tmp_path, callback)
    Tuner(trainer).lr_find(model, datamodule=Data(), num_training=5, attr_name="lr")
    assert is_adapted(model)
    trainer.fit(model, Data())
    assert_plain(model)


def test_a_fit_inside_a_hook_of_another_does_not_merge_what_that_trains(tmp_path):
    callback = lora_with_effect(merge_after_fit=True)
    adapted = []

    def inner(trainer: Any, pl_module: Any) -> None:
        make_trainer(tmp_path, callback).fit(pl_module, Data(1))
        adapted.append(is_adapted(pl_module))
        pl_module.trainer = trainer

    model = fit(tmp_path, callback, At("on_train_epoch_start", inner))
    assert adapted == [True, True]
    assert_plain(model)


def test_a_fit_that_is_broken_off_has_not_ended_because_one_inside_it_has():
    record = Injection(LoRAConfig())
    record.fits, run_of(record).fit_ended = 2, True
    assert not close_fit(record)  # the inner one, which is not the last
    assert not close_fit(record)  # a finder ends the outer one without its end
    record.fits, run_of(record).fit_ended = 1, True
    assert close_fit(record)


# --- what cannot leave plain layers ---


def test_launchers_are_refused_with_the_remedy():
    class _MultiProcessingLauncher:
        pass

    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=_MultiProcessingLauncher()))
    with pytest.raises(LoRAError, match=r"merge_after_fit .*merge_and_unload\(model\) after fit"):
        refuse_merge_after_fit(trainer, Net())


class Tied(Net):
    def build_head(self) -> None:
        self.second = nn.Linear(8, 8)
        self.second.weight = self.body[3].weight
        super().build_head()


def test_a_layer_that_cannot_be_merged_is_refused_before_training(tmp_path):
    trained: list[int] = []
    noting = At("on_train_batch_start", lambda trainer, module: trained.append(trainer.global_step))
    with pytest.raises(LoRAError, match=r"merged weights: cannot express the adapter of 'body\.3'"):
        fit(tmp_path, lora_with_effect(merge_after_fit=True), noting, model=Tied())
    assert trained == []


def test_another_value_than_true_or_false_is_refused():
    with pytest.raises(LoRAError, match="merge_after_fit must be true or false, but it is 'yes'"):
        LoRACallback(merge_after_fit="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("save", "merge_after_fit"), [("merged", True), ("merged", False), ("full", False)])
def test_a_library_that_loads_the_best_state_dict_after_fit_gets_its_outputs_or_an_error(
    tmp_path, save: str, merge_after_fit: bool
):
    model, trainer = best_and_after(tmp_path, save, merge_after_fit=merge_after_fit)
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    if save == "merged" and not merge_after_fit:
        before = weights(model)
        with pytest.raises(LoRAError, match=r'would be added to them a second time.* or save="full"'):
            model.load_state_dict(state)
        assert_same_tensors(weights(model), before)
    else:
        assert model.load_state_dict(state)
        plain = Net.load_from_checkpoint if save == "merged" else partial(load_from_checkpoint, Net)
        assert torch.equal(outputs(model), outputs(plain(trainer.checkpoint_callback.best_model_path)))


def test_the_mark_of_a_merged_model_says_what_it_is(tmp_path):
    model = fit(tmp_path, lora_with_effect(merge_after_fit=True))
    assert vars(model)[MERGED_FOR_GOOD] is True
    assert vars(copy.deepcopy(model))[MERGED_FOR_GOOD] is True
