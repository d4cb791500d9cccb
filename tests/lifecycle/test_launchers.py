"""Launchers that start processes from the main one: with inject() before fit the adapter arrives there."""

from __future__ import annotations

import pytest

STRATEGIES = ["ddp_fork", "ddp_notebook", "ddp_spawn"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_arrives_in_the_main_process(launched, strategy: str):
    found = launched[strategy]
    assert found["trained"]
    assert found["arrived"]
    assert found["base"]
    assert not found["merged"]
    assert found["saved after"]
    assert len([name for name in found["saved"] if "lora" in name]) == 6
    assert not [name for name in found["saved"] if "lora" not in name and not name.startswith("body.1.")]


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_without_inject_it_is_refused_with_the_remedy(launched, strategy: str):
    assert "Call inject(model, LoRAConfig(...)) before fit, or use strategy='ddp'." in launched["refused"][strategy]


def test_the_callback_one_writes_first_loses_the_adapter(launched):
    """It trains and saves one, but the model of the main process has none, and nothing says so."""
    assert len(launched["lost"]["saved"]) == 6
    assert launched["lost"]["arrived"] == []


def test_evaluation_needs_no_inject(launched):
    assert launched["validated"]["True"] == pytest.approx(launched["validated"]["False"], rel=1e-5)


def test_verify_reports_the_largest_error_of_all_ranks(launched):
    metrics = launched["ddp_fork"]["metrics"]
    assert metrics["differs"] == 1, "the ranks agree; this shows nothing"
    assert metrics["lora_merge_error_max"] == metrics["expected"] > 0
