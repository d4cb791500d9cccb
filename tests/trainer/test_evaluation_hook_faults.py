"""An exception in any hook of an evaluation, the callback's or the module's: unmerged after, next fit right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import is_merged
from support.runs.training import Data, Net, assert_same_tensors, make_trainer, weights
from support.runs.with_callback import (
    At,
    BrokenError,
    Watched,
    assert_as_found,
    assert_same_numbers,
    base_weights,
    lora_with_effect,
)

STAGES = {"fit": "validation", "validate": "validation", "test": "test", "predict": "predict"}
EVERYDAY = {"last": "on_{}_batch_end", "module": "{}_step"}  # the others are slow
TRANSFERS = ["transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"]


def places(fn: str, stage: str) -> list[tuple[str, str, str]]:
    """Everything of the user's that Lightning calls while that stage runs, as (fn, owner, hook)."""
    callback, module = (
        [name for name in dir(owner) if name.startswith(f"on_{stage}_")] for owner in (L.Callback, L.LightningModule)
    )
    if fn == "validate":
        module.remove("on_validation_model_zero_grad")  # only inside fit
    loader = [] if fn == "fit" else [f"{fn.removesuffix('idate')}_dataloader"]  # fit loads it before the first epoch
    owners = {"first": callback, "last": callback, "module": [*module, f"{stage}_step"], "data": [*TRANSFERS, *loader]}
    return [(fn, owner, hook) for owner, hooks in owners.items() for hook in hooks]


def everyday(fn: str, owner: str, hook: str) -> bool:
    return hook == EVERYDAY.get(owner, "").format(STAGES[fn])


CASES = [
    pytest.param(*place, marks=[] if everyday(*place) else pytest.mark.slow)
    for fn, stage in STAGES.items()
    for place in places(fn, stage)
    if fn == "fit" or place[1] in ("last", "module") or everyday(*place)
]


class Fault:
    """Raised once: in the second epoch of a fit, at the second batch where there are batches."""

    def __init__(self, fn: str, hook: str) -> None:
        self.fn = fn
        self.left = 2 if "batch" in hook or hook.endswith("_step") else 1

    def __call__(self, trainer: L.Trainer) -> None:
        if (trainer.training or trainer.sanity_checking) or (self.fn == "fit" and trainer.current_epoch == 0):
            return
        self.left -= 1
        if self.left == 0:
            raise BrokenError("a fault on purpose")


def plant(fault: Fault, owner: str, hook: str, model: Net, data: Data) -> list[L.Callback]:
    """Make a hook raise; the callback that does it, if one does."""
    if owner in ("first", "last"):
        return [At(hook, lambda trainer, _: fault(trainer))]
    target = model if owner == "module" else data
    original = getattr(target, hook)

    def raising(*args: Any, **kwargs: Any) -> Any:
        fault(model.trainer)
        return original(*args, **kwargs)

    setattr(target, hook, raising)
    return []


def faulty_run(path: Path, merged_eval: bool, fn: str, owner: str, hook: str) -> Net:
    """Train, fault, train again."""
    torch.manual_seed(0)
    model, data, callback = Watched(), Data(2), lora_with_effect(merged_eval=merged_eval)
    before = base_weights(model)
    make_trainer(path, callback).fit(model, data)
    fault = Fault(fn, hook)
    planted = plant(fault, owner, hook, model, data)
    callbacks = [*planted, callback] if owner == "first" else [callback, *planted]
    trainer = make_trainer(path, *callbacks, max_epochs=2)
    with pytest.raises(BrokenError):
        getattr(trainer, fn)(model, data)
    assert fault.left == 0
    assert_as_found(model, before)
    for target in (model, data):
        vars(target).pop(hook, None)
    model.train()  # Lightning leaves it in evaluation mode
    make_trainer(path, callback).fit(model, data)
    assert_as_found(model, before)
    return model


@pytest.mark.parametrize(("fn", "owner", "hook"), CASES)
def test_exception_in_any_hook_leaves_the_model_unmerged_and_the_next_fit_right(
    tmp_path, fn: str, owner: str, hook: str
):
    merged, factored = (faulty_run(tmp_path / str(on), on, fn, owner, hook) for on in (True, False))
    assert any(was for _, was, _ in merged.seen) or "batch" not in hook
    assert_same_numbers(merged.seen, factored.seen)
    assert_same_tensors(weights(merged), weights(factored))


class BreaksTheWayOut(L.Callback):
    """Listed first, it keeps Lightning from telling the others of the exception."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        raise BrokenError("on the way out")


@pytest.mark.parametrize(
    ("fn", "next_fn"), [("fit", "fit"), ("validate", "test"), ("test", "predict"), ("predict", "validate")]
)
def test_exception_unseen_by_the_callback_leaves_the_next_run_right(tmp_path, fn: str, next_fn: str):
    """Whatever runs next is right and leaves the model as it should be."""

    def run(merged_eval: bool) -> tuple[Net, Any]:
        torch.manual_seed(0)
        model, callback = Watched(), lora_with_effect(merged_eval=merged_eval)
        before = base_weights(model)
        make_trainer(tmp_path, callback).fit(model, Data(2))
        fault = Fault(fn, "batch")
        hook = At(f"on_{STAGES[fn]}_batch_end", lambda trainer, _: fault(trainer))
        trainer = make_trainer(tmp_path, BreaksTheWayOut(), callback, hook, max_epochs=2)
        with pytest.raises(BrokenError, match="on the way out"):
            getattr(trainer, fn)(model, Data(2))
        assert is_merged(model) is merged_eval, "the fault was heard of; this test shows nothing"
        model.train()
        getattr(make_trainer(tmp_path, callback), next_fn)(model, Data(2))
        assert_as_found(model, before)
        return model

    merged, factored = run(True), run(False)
    assert_same_numbers(merged.seen, factored.seen)
    assert_same_tensors(weights(merged), weights(factored))
