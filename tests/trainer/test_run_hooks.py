"""What the callback notes of a run: in the record of the injection, from setup to teardown, and not in copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.tuner import Tuner

from lightning_lora import LoRACallback, LoRAConfig, inject, is_merged
from lightning_lora.model.injection import Injection
from lightning_lora.trainer.run_state import INSIDE, Run, injection_of, run_of
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import Data, Net, make_trainer
from support.runs.with_callback import At, BrokenError, lora_with_effect

COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])


def noted(record: Injection) -> dict[str, Any]:
    """What differs from the record of a model that was in no run."""
    names = vars(Run()).keys() - Run().__getstate__().keys() - {"looked_at", "epoch_begins"}  # each fit sets these anew
    facts = ("fits", "in_training_batch", "merged_to_evaluate")
    found = {name: getattr(run_of(record), name) for name in names} | {name: getattr(record, name) for name in facts}
    found["merged"] = "merged" in record.marks
    fresh = {**vars(Run()), "fits": 0, "in_training_batch": False, "merged_to_evaluate": False, "merged": False}
    return {name: value for name, value in found.items() if value != fresh[name]}


class Breaks(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise BrokenError


@UNTRAINED_NOTICE
@pytest.mark.parametrize(("stage", "inside"), [("fit", False), ("fit", True), ("validate", True), ("predict", False)])
def test_nothing_of_a_run_is_left_after_it(tmp_path: Path, stage: str, inside: bool):
    seen: list[dict[str, Any]] = []
    hook = "on_train_batch_start" if stage == "fit" else f"on_{stage.replace('validate', 'validation')}_batch_end"
    model, callback = Net(), LoRACallback(r=2)
    if inside:
        inject(model.body, LoRAConfig(r=2))
    look = At(hook, lambda trainer, module: seen.append(noted(injection_of(module))))
    getattr(make_trainer(tmp_path, callback, look), stage)(model, Data(1))
    assert seen == [
        {"in_training_batch": True, "fits": 1} if stage == "fit" else {"merged": True, "merged_to_evaluate": True}
    ]
    assert INSIDE not in vars(model)
    assert noted(injection_of(model)) == {}


def test_nothing_of_a_run_is_left_after_an_exception(tmp_path: Path):
    with pytest.raises(BrokenError):
        make_trainer(tmp_path, lora_with_effect()).fit(model := Breaks(), Data(1))
    assert noted(injection_of(model)) == {}
    assert not is_merged(model)


def test_a_second_fit_says_that_training_goes_on_and_one_after_a_finder_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = Net()
    trainers = [make_trainer(tmp_path, lora_with_effect()) for _ in range(2)]
    with caplog.at_level("INFO", "lightning_lora"):
        Tuner(trainers[0]).lr_find(model, Data(4), num_training=3, update_attr=False)
        trainers[0].fit(model, Data(1))
        assert "training goes on" not in caplog.text
        trainers[1].fit(model, Data(1))
        assert "training goes on from the adapter that the model holds" in caplog.text


@COPIES
def test_a_copy_made_in_a_run_is_in_none_and_has_a_record_of_its_own(tmp_path: Path, copied: Any):
    copies: list[Net] = []

    def take(trainer: Any, module: Any) -> None:
        module.trainer = None
        copies.append(copied(module))
        module.trainer = trainer

    model = Net()
    make_trainer(tmp_path, lora_with_effect(), At("on_train_batch_end", take), At("on_train_batch_start", take)).fit(
        model, Data(1)
    )
    for each in copies:
        assert injection_of(each) is not injection_of(model)
        assert noted(injection_of(each)) == {}
        make_trainer(tmp_path, lora_with_effect()).fit(each, Data(1))


@COPIES
def test_a_copy_of_a_callback_has_its_options_and_trains(tmp_path: Path, copied: Any):
    callback, copies = LoRACallback(r=2, seed=3, merged_eval=False), list[Any]()
    look = At("on_train_batch_end", lambda trainer, module: copies.append(copied(callback)))
    make_trainer(tmp_path, callback, look).fit(Net(), Data(1))
    assert repr(copies[0]) == repr(callback)
    make_trainer(tmp_path, copies[0]).fit(model := Net(), Data(1))
    assert model.head.lora_B.abs().sum() > 0
