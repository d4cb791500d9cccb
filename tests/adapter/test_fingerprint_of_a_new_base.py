"""A base that was trained with Lightning: messages where a newly built base of the class meets its adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_lora import LoRAError, load_adapter, load_from_checkpoint
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, fit_model, make_trainer, outputs
from support.runs.with_callback import lora


def tuned(path: Path, kind: str) -> Net:
    """Trained by plain Lightning into pretrained.ckpt, then by LoRA into lora.ckpt."""
    fit_model(path, Net(width=7), saved=path / "pretrained.ckpt")
    model = Net.load_from_checkpoint(path / "pretrained.ckpt")
    fit_model(path, model, lora(save=kind), saved=path / "lora.ckpt")
    return model


@pytest.mark.slow
def test_load_from_checkpoint_onto_a_fresh_base_says_the_call_that_loads_it(tmp_path, monkeypatch):
    model = tuned(tmp_path, "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoRAError, match="belongs to another base: values of") as refused:
        load_from_checkpoint(Net, "lora.ckpt")
    remedy = re.search(
        r"weights that it had in training, .*(load_adapter\(model, \"lora\.ckpt\"\))", str(refused.value)
    )
    assert remedy is not None
    built = Net.load_from_checkpoint("pretrained.ckpt")
    exec(remedy[1], {"model": built, "load_adapter": load_adapter})
    assert torch.equal(outputs(built), outputs(model))
    with pytest.warns(UserWarning, match="belongs to another base: values of"):
        loaded = load_from_checkpoint(Net, "lora.ckpt", strict_base=False)
    assert torch.equal(loaded.head.lora_B, model.head.lora_B)
    assert torch.equal(loaded.head.weight, Net(width=7).head.weight)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("adapter", "fit"), ("merged", "validate")])
def test_trainer_with_a_fresh_base_says_what_can_be_done_there(tmp_path, kind: str, stage: str):
    tuned(tmp_path, kind)
    with pytest.raises(LoRAError, match="belongs to another base: values of") as refused:
        getattr(make_trainer(tmp_path, lora(save=kind), max_epochs=2), stage)(
            Net(width=7), Data(), ckpt_path=tmp_path / "lora.ckpt", **PLAIN_TYPES_ONLY
        )
    assert "Build the module with the weights that it had in training" in str(refused.value)
    assert "load_adapter(model, path, strict_base=False) and leave ckpt_path out" in str(refused.value)
    base = Net.load_from_checkpoint(tmp_path / "pretrained.ckpt")
    trainer = make_trainer(tmp_path, lora(save=kind), max_epochs=2)
    getattr(trainer, stage)(base, Data(), ckpt_path=tmp_path / "lora.ckpt", **PLAIN_TYPES_ONLY)
