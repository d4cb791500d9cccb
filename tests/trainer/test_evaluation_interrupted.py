"""What remains after an interrupted evaluation, and after a user who merges by hand."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

import pytest
import torch

from lightning_lora import is_merged, merge, unmerge
from support.runs.training import Net, assert_same_tensors, make_trainer
from support.runs.with_callback import Steps, lora, run, trained


@pytest.mark.parametrize(("stage", "fault"), [("fit", KeyboardInterrupt), ("test", RuntimeError)])
def test_a_fault_in_evaluation_leaves_the_model_unmerged_and_the_next_fit_right(
    tmp_path, stage: str, fault: type[BaseException]
):
    step = "validation_step" if stage == "fit" else "test_step"

    def faulty(merged_eval: bool) -> Net:
        model = Steps()
        trained(tmp_path, model, lora(merged_eval=merged_eval), max_epochs=2)
        model.fault, model.faulty = fault("on purpose"), step
        with pytest.raises(SystemExit if fault is KeyboardInterrupt else fault):
            run(make_trainer(tmp_path, lora(merged_eval=merged_eval)), stage, model)
        assert model.seen[-1] == (step, merged_eval)
        assert not is_merged(model)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning switches Ctrl-C off once it was pressed
        return trained(tmp_path, model, lora(merged_eval=merged_eval), max_epochs=2)

    model = faulty(merged_eval=True)
    assert torch.equal(model.head.weight, Net().head.weight)
    assert_same_tensors(model.state_dict(), faulty(merged_eval=False).state_dict())


@pytest.mark.core
def test_ctrl_c_while_the_trainer_merges_leaves_the_model_unmerged(tmp_path, monkeypatch):
    """The signal is held back until every layer is merged, and reaches the Trainer before merge returns."""

    def press(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return merge_layer(*args)

    merging = importlib.import_module("lightning_lora.model.merging")
    merge_layer = merging._merge_layer
    model = trained(tmp_path, Net(), lora())
    monkeypatch.setattr(merging, "_merge_layer", press)
    with pytest.raises(SystemExit):
        run(make_trainer(tmp_path, lora()), "test", model)
    assert not is_merged(model)
    assert torch.equal(model.head.weight, Net().head.weight)


@pytest.mark.core
def test_a_model_that_the_user_left_merged_is_trained_unmerged(tmp_path):
    def start(leave_merged: bool) -> Net:
        model = trained(tmp_path, Net(), lora())
        if leave_merged:
            merge(model)
        return trained(tmp_path, model, lora())

    assert_same_tensors(start(leave_merged=True).state_dict(), start(leave_merged=False).state_dict())


def test_a_model_that_the_user_merged_is_left_merged_by_a_test(tmp_path):
    model = trained(tmp_path, Net(), lora())
    merge(model)
    run(make_trainer(tmp_path, lora()), "test", model)
    assert is_merged(model)
    unmerge(model)
    assert torch.equal(model.head.weight, Net().head.weight)
