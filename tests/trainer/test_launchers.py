"""Launchers that start processes from the main one: with inject() before fit the adapter arrives there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, load_adapter, save_adapter
from lightning_lora.model.adapted_model import open_model
from lightning_lora.trainer.checkpoint_hooks import export_state
from lightning_lora.trainer.compatibility import warn_of_part
from support.programs.launched_fits import Unfreezes
from support.training import Data, Net, assert_same_tensors, make_trainer

KINDS = {"ddp_fork": "adapter", "ddp_notebook": "merged", "ddp_spawn": "full"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", KINDS)
def test_the_adapter_arrives_in_the_main_process(launched, strategy: str):
    found = launched[strategy]
    assert found["trained"]
    assert found["arrived"]
    assert found["base"]
    assert not found["merged"]
    assert found["saved after"]
    assert len([name for name in found["saved"] if "lora" in name]) == 6
    base = [name for name in found["saved"] if "lora" not in name and not name.startswith("body.1.")]
    assert base == (
        ["body.0.bias", "body.0.weight", "body.3.bias", "body.3.weight", "head.bias", "head.weight"]
        if KINDS[strategy] == "full"
        else ["head.bias"]
    )  # which the fit unfroze


@pytest.mark.parametrize("strategy", KINDS)
def test_checkpoint_of_the_main_process_equals_that_of_the_started_one(launched, strategy: str):
    """What a callback's checkpoint at the end of the fit holds, in the started process, also without its hooks."""
    found = launched[strategy]
    assert found["kinds"] == [KINDS[strategy]] * 2
    assert found["as there"] == [True, True]
    assert found["described as there"] == [True, True]


def launched_fit(path: Path, part: str = "", *callbacks: Any) -> tuple[Net, Net]:
    """What a launcher does, without its processes: the model there, and the one here afterwards."""
    started, here = Net(), Net()
    for model in (started, here):
        inject(model.get_submodule(part), LoRAConfig(r=2, init_lora_weights=False))
    make_trainer(path, LoRACallback(save="adapter"), *callbacks, max_epochs=2).fit(started, Data())
    export_state(open_model(started, "test"))
    here.load_state_dict(started.state_dict(), strict=False)
    return started, here


def saved_after_it(path: Path, part: str, weights_only: bool) -> Any:
    started, here = launched_fit(path, part)
    trainer = make_trainer(path, LoRACallback(save="adapter"))
    trainer.strategy._lightning_module = here
    trainer.save_checkpoint(path / "after.ckpt", weights_only=weights_only)
    found = torch.load(path / "after.ckpt", weights_only=True)
    if "lora" in found:
        expected = adapter_state_dict(started)
        assert_same_tensors(found["state_dict"], dict(expected))
    return found


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("part", ["", "body"])
def test_injected_part_is_saved_by_the_hook_of_the_callback_alone(tmp_path, part: str, weights_only: bool):
    """A part knows nothing of the module around it, so that the callback's hook must help, where it is called."""
    found = saved_after_it(tmp_path, part, weights_only)
    assert ("lora" in found) is not (part and weights_only)
    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=1)
    trainer.state.fn = TrainerFn.FITTING
    with pytest.warns(UserWarning, match=r"inject was called on 'body'.*weights_only=True") if part else nullcontext():
        warn_of_part(trainer, part)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_launcher_without_inject_is_refused_with_the_remedy(launched, strategy: str):
    assert "Call inject(model, LoRAConfig(...)) before fit, or use strategy='ddp'." in launched["refused"][strategy]


def test_naive_callback_loses_the_adapter_in_started_processes(launched):
    """It trains and saves one, but the model of the main process has none, and nothing says so."""
    assert len(launched["lost"]["saved"]) == 6
    assert launched["lost"]["arrived"] == []


def test_evaluation_needs_no_inject(launched):
    assert launched["validated"]["True"] == pytest.approx(launched["validated"]["False"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen")
def test_earlier_adapter_loads_after_a_started_process_unfroze_a_weight(tmp_path):
    """It belongs to the base with the first value of that weight, which the main process must know for it."""
    first = Net()
    inject(first, LoRAConfig(r=2))
    save_adapter(first, tmp_path / "first")
    _, here = launched_fit(tmp_path, "", Unfreezes())
    assert not torch.equal(here.head.bias, first.head.bias)
    load_adapter(here, tmp_path / "first")
    assert_same_tensors(dict(here.state_dict()), dict(first.state_dict()) | dict(here.named_buffers()))
