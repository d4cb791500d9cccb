"""The record of an injection: one for each injection, and what it notes of merging."""

from __future__ import annotations

import copy

import pytest

from lightning_lora import LoRAConfig, inject, merge, unload, unmerge
from lightning_lora.trainer.run_state import injection_of
from support.runs.training import Net


def test_a_model_that_is_injected_anew_has_the_new_record():
    for root in (lambda model: model, lambda model: model.body):
        model = Net()
        inject(root(model), LoRAConfig(r=1))
        first = injection_of(model)
        assert injection_of(model) is first
        unload(root(model))
        assert injection_of(model) is None
        inject(root(model), LoRAConfig(r=1))
        assert injection_of(model) not in (None, first)


@pytest.mark.parametrize("undone", ["all", "a part"])
def test_the_record_says_merged_until_all_layers_are_unmerged(undone: str):
    inject(model := Net(), LoRAConfig(r=1))
    merge(model)
    assert "merged" in injection_of(model).marks
    assert "merged" in copy.deepcopy(model).lora_injection.marks
    unmerge(model if undone == "all" else model.body)
    assert ("merged" in injection_of(model).marks) == (undone == "a part")
    unmerge(model)
    assert "merged" not in injection_of(model).marks
