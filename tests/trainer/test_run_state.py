"""What LoRACallback asks for and notes, in the injection: copies keep the options, and are in no run."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from typing import Any

import pytest
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, take_adapter, unload
from lightning_lora.trainer.run_state import ASKED, Run, run_of


def in_a_run() -> nn.Sequential:
    inject(model := nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    model.lora_injection.run = Run(
        merged_eval=True,
        save="merged",
        quantize="nf4",
        dequantize="bfloat16",
        stays_unmerged=True,
        epoch_begins=True,
        looked_at=frozenset({1}),
        fit_ended=True,
    )
    injection: Any = model.lora_injection
    injection.fits, injection.in_training_batch, injection.merged_to_evaluate = 1, True, True
    return model


def test_an_injection_has_one_run_from_the_first_call_on():
    inject(model := nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    assert model.lora_injection.run is None
    assert run_of(model.lora_injection) == Run()
    assert run_of(model.lora_injection) is run_of(model.lora_injection)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_keeps_what_is_asked_and_nothing_of_what_is_noted(copied: Any):
    model = in_a_run()
    injection = copied(model).lora_injection
    own, of_copy, fresh = run_of(model.lora_injection), run_of(injection), Run()
    for each in fields(Run):
        assert getattr(own, each.name) != getattr(fresh, each.name)
        assert getattr(of_copy, each.name) == getattr(own if each.name in ASKED else fresh, each.name)
    assert (injection.fits, injection.in_training_batch, injection.merged_to_evaluate) == (0, False, False)


def test_an_adapter_that_replaces_another_goes_on_in_its_run():
    model = in_a_run()
    model.lora_injection.fits = 0  # inside of a fit such an adapter is refused
    unload(other := copy.deepcopy(model))
    inject(other, LoRAConfig(r=3, use_dora=True))
    before = model.lora_injection
    load_adapter(model, take_adapter(other))
    after = model.lora_injection
    assert after is not before
    assert after.run is before.run
    assert after.in_training_batch
    assert after.merged_to_evaluate
