"""Launchers that start processes from the main one: with inject() before fit the adapter arrives there."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject
from support.runs.training import Data, Net, assert_same_tensors, make_trainer

pytestmark = pytest.mark.slow

KINDS = {"ddp_fork": "adapter", "ddp_notebook": "merged", "ddp_spawn": "full"}


@pytest.mark.parametrize("strategy", KINDS)
def test_checkpoint_of_the_main_process_is_that_of_the_started_one(launched, strategy: str):
    """What a callback's checkpoint at the end of the fit holds, in the started process."""
    found = launched[strategy]
    assert found["kind"] == KINDS[strategy]
    assert found["as there"]
    assert found["described as there"]
    assert len([name for name in found["saved"] if "lora" in name]) == 6
    base = [name for name in found["saved"] if "lora" not in name and not name.startswith("body.1.")]
    full = ["body.0.bias", "body.0.weight", "body.3.bias", "body.3.weight", "head.bias", "head.weight"]
    assert base == (full if KINDS[strategy] == "full" else [])


def test_injected_part_is_saved_by_the_hook_of_the_callback(tmp_path):
    """What a launcher does, without its processes: the model there, and the one here afterwards."""
    started, here = Net(), Net()
    for model in (started, here):
        inject(model.body, LoRAConfig(r=2, init_lora_weights=False))
    make_trainer(tmp_path, LoRACallback(save="adapter"), max_epochs=2).fit(started, Data())
    here.load_state_dict(started.state_dict())
    trainer = make_trainer(tmp_path, LoRACallback(save="adapter"))
    trainer.strategy._lightning_module = here
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    found = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert found["lora"]["kind"] == "adapter"
    assert_same_tensors(found["state_dict"], dict(adapter_state_dict(started)))


def test_evaluation_needs_no_inject(launched):
    assert launched["validated"]["True"] == pytest.approx(launched["validated"]["False"], rel=1e-5)
