"""A second Trainer inside a hook of the first: on the same model, on a copy of it, on another model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback
from support.covering import covering
from support.runs.training import Data, Net, assert_same_tensors, make_trainer
from support.runs.with_callback import (
    At,
    Watched,
    assert_as_found,
    assert_same_numbers,
    base_weights,
    compare,
    lora_with_effect,
)

TRAINING_HOOKS = ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"]
VALIDATION_HOOKS = [
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
]


def second_epoch(trainer: Any) -> bool:
    return trainer.current_epoch == 1 and not trainer.sanity_checking


def inner_callbacks(kind: str, outer: LoRACallback) -> list[LoRACallback]:
    own = LoRACallback(merged_eval=outer.merged_eval)
    return {"none": [], "its own": [own], "the same": [outer]}[kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "kind", "hook"),
    covering([True, False], ["none", "its own", "the same"], TRAINING_HOOKS + VALIDATION_HOOKS, meet=1),
)
def test_inner_validation_of_the_same_model_leaves_the_outer_run_right(tmp_path, hook: str, before: bool, kind: str):
    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        def inner(trainer: Any, pl_module: Any) -> None:
            make_trainer(path / "inner", *inner_callbacks(kind, callback)).validate(pl_module, Data(1), verbose=False)
            pl_module.trainer = trainer

        callbacks = [callback, At(hook, inner, second_epoch)]
        make_trainer(path, *(reversed(callbacks) if before else callbacks), max_epochs=2).fit(model, Data(2))

    compare(tmp_path, run, always=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "hook"),
    [("its own", "on_train_batch_start"), ("the same", "on_train_batch_end"), ("the same", "on_validation_batch_end")],
)
def test_copy_trained_inside_a_hook_trains_as_one_of_an_unmerged_model(tmp_path, hook: str, kind: str):
    """The copy, taken merged in some hooks, trains as a copy of an unmerged model does."""
    copies = {}

    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        def inner(trainer: Any, pl_module: Any) -> None:
            twin = copy.deepcopy(pl_module)
            twin.train()  # Lightning would keep the modes of a model that is in evaluation
            base, twin.seen = base_weights(model_before), []
            make_trainer(path / "inner", *inner_callbacks(kind, callback)).fit(twin, Data())
            assert_as_found(twin, base)
            copies.setdefault(callback.merged_eval, []).append(twin)

        model_before = Watched()
        make_trainer(path, callback, At(hook, inner, second_epoch), max_epochs=2).fit(model, Data(2))

    model = compare(tmp_path, run, always=False, lora_dropout=0.3)
    assert copies[True]
    for merged, factored in zip(copies[True], copies[False], strict=True):
        assert_same_numbers(merged.seen, factored.seen)
        assert_same_tensors(dict(merged.state_dict()), dict(factored.state_dict()))
        assert not torch.equal(merged.head.lora_B, model.head.lora_B)


@pytest.mark.parametrize(
    ("kind", "precision", "hook"),
    covering(["its own", "the same"], ["32-true", "bf16-true"], ["on_test_start", "on_test_batch_end"], meet=1),
)
def test_copy_made_in_inference_mode_tests_as_the_model_does(tmp_path, hook: str, kind: str, precision: str):
    """Its parameters may be written to in inference mode alone."""
    models, options = {}, {"precision": precision}
    for merged_eval in (True, False):
        copies, callback = [], lora_with_effect(merged_eval=merged_eval)

        def inner(trainer: Any, pl_module: Any, copies: list[Net] = copies, callback: LoRACallback = callback) -> None:
            twin = copy.deepcopy(pl_module)
            twin.seen = []
            make_trainer(tmp_path, *inner_callbacks(kind, callback), **options).test(twin, Data(1), verbose=False)
            copies.append(twin)

        torch.manual_seed(0)
        make_trainer(tmp_path, callback, At(hook, inner), **options).test(Watched(), Data(1), verbose=False)
        models[merged_eval] = copies[0]
    assert models[True].head.weight.is_inference()
    assert models[True].seen[0][1]
    tolerance = 1e-5 if precision == "32-true" else 4 * 2**-8
    assert models[True].seen[0][2] == pytest.approx(models[False].seen[0][2], rel=tolerance)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_end", "on_validation_end"])
def test_inner_fit_of_the_same_model_leaves_the_outer_run_right(tmp_path, hook: str):
    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        def inner(trainer: Any, pl_module: nn.Module) -> None:
            modes = {module: module.training for module in pl_module.modules()}
            pl_module.train()
            make_trainer(path / "inner", LoRACallback(merged_eval=callback.merged_eval)).fit(pl_module, Data())
            for module, mode in modes.items():
                module.training = mode
            pl_module.trainer = trainer

        make_trainer(path, callback, At(hook, inner, second_epoch), max_epochs=2, inference_mode=False).fit(
            model, Data(2)
        )

    compare(tmp_path, run, always=False)


@pytest.mark.parametrize(("stage", "hook"), [("test", "on_train_batch_start"), ("fit", "on_validation_batch_end")])
def test_callback_used_on_another_model_inside_a_hook_serves_both(tmp_path, hook: str, stage: str):
    others: dict[bool, list[Net]] = {}

    def run(path: Path, model: Net, callback: LoRACallback) -> None:
        def inner(trainer: Any, pl_module: nn.Module) -> None:
            with torch.random.fork_rng(devices=[]):
                other = Watched(seed=5)
                base = base_weights(other)
                with torch.enable_grad():
                    getattr(make_trainer(path / "inner", callback), stage)(other, Data())
                assert_as_found(other, base)
            others.setdefault(callback.merged_eval, []).append(other)

        make_trainer(path, callback, At(hook, inner, second_epoch), max_epochs=2).fit(model, Data(2))

    compare(tmp_path, run, always=False)
    for merged, factored in zip(others[True], others[False], strict=True):
        assert_same_numbers(merged.seen, factored.seen)
        assert_same_tensors(dict(merged.state_dict()), dict(factored.state_dict()))
