"""Every loop of the Trainer gives the metrics of the run evaluated unmerged, and leaves the base as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_lora import LoRACallback
from support.runs.shortcuts import let_collections_pass_over_what_is_there
from support.runs.training import Data, Net, SizedData, TwoLoaders, make_trainer
from support.runs.with_callback import At, Watched, assert_as_found, base_weights, compare, lora_with_effect


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    let_collections_pass_over_what_is_there()  # the batch size finder collects garbage at each trial


def fitting(data: Callable[[], Data] = Data, **options: Any) -> Any:
    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        make_trainer(path, callback, **{"max_epochs": 2} | options).fit(model, data())

    return run


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ({"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": 3}, 4 * 3),
        ({"limit_val_batches": 0}, 0),
        ({"max_steps": 5, "max_epochs": -1, "val_check_interval": 2}, 2 * 3),
        ({"inference_mode": False, "num_sanity_val_steps": 1}, 1 + 2 * 3),
    ],
    ids=str,
)
def test_validation_inside_fit_is_merged_and_equals_the_unmerged_run(tmp_path, options: dict[str, Any], evaluated: int):
    def no_evaluation(path: Path, model: Net, callback: LoRACallback) -> None:
        """So that compare sees one merged evaluation."""
        make_trainer(path, callback).test(model, Data(), verbose=False)

    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        fitting(**options)(path, model, callback)
        no_evaluation(path, model, callback)

    model = compare(tmp_path, run)
    assert len([stage for stage, *_ in model.seen if stage == "validation"]) == evaluated


@pytest.mark.parametrize(("data", "inference_mode"), [(Data, False), (TwoLoaders, True)])
def test_evaluation_around_fits_equals_the_unmerged_run(tmp_path, data: type[Data], inference_mode: bool):
    def run(path: Path, model: Net, callback: LoRACallback) -> list[float]:
        trainer = make_trainer(path, callback, inference_mode=inference_mode)
        numbers = [metric for found in trainer.validate(model, data(), verbose=False) for metric in found.values()]
        trainer.test(model, data(), verbose=False)
        trainer.predict(model, data())
        trainer.fit(model, data())
        numbers += [metric for found in trainer.test(model, data(), verbose=False) for metric in found.values()]
        numbers += torch.cat([x.flatten() for x in flat(trainer.predict(model, data()))]).tolist()
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data())
        numbers += [metric for found in trainer.validate(model, data(), verbose=False) for metric in found.values()]
        return numbers

    model = compare(tmp_path, run)
    assert {stage for stage, *_ in model.seen} == {"train", "validation", "test", "predict"}


def flat(predictions: Any) -> list[torch.Tensor]:
    return [p for item in predictions for p in flat(item)] if isinstance(predictions, list) else [predictions]


def test_two_trainers_on_one_model_equal_the_unmerged_run(tmp_path):
    """Each with a callback of its own, the second without options."""

    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        make_trainer(path, callback).fit(model, Data())
        second = LoRACallback(merged_eval=callback.merged_eval)
        make_trainer(path, second).fit(model, Data())
        make_trainer(path, callback).validate(model, Data(), verbose=False)

    compare(tmp_path, run)


def test_two_live_trainers_in_turn_equal_the_unmerged_run(tmp_path):
    """One callback in two Trainers that are both alive, each validated between the other's fits."""

    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        trainers = [make_trainer(path / str(i), callback) for i in range(2)]
        for epoch in (1, 2):
            for trainer in trainers:
                trainer.fit_loop.max_epochs = epoch
                trainer.fit(model, Data())
                trainer.validate(model, Data(), verbose=False)

    compare(tmp_path, run)


def test_learning_rate_finder_restores_the_weights_before_the_fit(tmp_path):
    """Its restore loads an adapter checkpoint strictly."""
    model = Watched()
    base = base_weights(model)
    found = {}

    def remember(trainer: Any, pl_module: nn.Module) -> None:
        found[len(found)] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    finder = LearningRateFinder(num_training_steps=20, attr_name="lr", early_stop_threshold=None)
    watches = [At("on_fit_start", remember), finder, At("on_train_start", remember)]
    make_trainer(tmp_path, lora_with_effect(), *watches).fit(model, LongData())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert_as_found(model, base)


def test_tuner_finds_the_values_of_the_unmerged_run(tmp_path):
    def run(path: Path, model: Net, callback: LoRACallback) -> list[float]:
        data = SizedData()
        trainer = make_trainer(path, callback)
        size = Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=1)
        rate = Tuner(trainer).lr_find(model, datamodule=data, num_training=20, attr_name="lr")
        make_trainer(path, callback).fit(model, data)
        return [size, *rate.results["loss"]]

    compare(tmp_path, run, always=False)


def test_a_finder_tries_the_model_unmerged_and_leaves_it_adapted(tmp_path):
    """Lightning takes the callbacks out meanwhile."""
    model = Watched()
    base = base_weights(model)
    trainer = make_trainer(tmp_path, lora_with_effect())
    Tuner(trainer).scale_batch_size(model, datamodule=SizedData(), max_trials=2, method="validate", steps_per_trial=1)
    assert {(stage, merged) for stage, merged, _ in model.seen} == {("validation", False)}
    assert_as_found(model, base)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in base)
    model.seen.clear()
    trainer.validate(model, Data(), verbose=False)
    assert {(stage, merged) for stage, merged, _ in model.seen} == {("validation", True)}


class LongData(Data):
    def __init__(self) -> None:
        super().__init__(batches=5)


def find_rate(trainer: L.Trainer, model: Net, data: Data) -> None:
    Tuner(trainer).lr_find(model, datamodule=data, num_training=3, attr_name="lr", early_stop_threshold=None)


def rate_finder() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=3, attr_name="lr", early_stop_threshold=None)


def size_finder() -> BatchSizeFinder:
    return BatchSizeFinder(max_trials=1, steps_per_trial=1)


@pytest.mark.parametrize(("variant", "finder"), [("lora", size_finder), ("dora", rate_finder), ("loha", find_rate)])
def test_adapters_that_a_finder_trained_and_restored_are_not_taken_for_untrained(tmp_path, variant, finder):
    """The sanity check merges adapters that have had gradients and are as they began: a warning would be an error."""
    callbacks = [] if finder is find_rate else [finder()]
    trainer = make_trainer(tmp_path, *callbacks, LoRACallback(r=2, variant=variant), num_sanity_val_steps=1)
    model, data = Net(), SizedData()
    if finder is find_rate:
        finder(trainer, model, data)
    trainer.fit(model, data)
