"""Trainers, `scaled` and the strengths that callbacks and checkpoints say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, attach, attached, inject, scaled, take_adapter
from lightning_lora.adapter.adapter import Adapter
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, assert_same_tensors, make_trainer, outputs
from support.runs.with_callback import BATCHES, TARGETS, Watched, lora, lora_with_effect, run


def sft() -> Adapter:
    inject(model := Net(), LoRAConfig(r=3, target_modules=TARGETS, init_lora_weights=False), seed=1)
    return take_adapter(model)


@pytest.mark.parametrize("given", [0.25, 1.0])
def test_strength_of_the_callback_that_differs_from_the_attached_ones_is_an_error(tmp_path: Path, given: float):
    attach(model := Net(), sft(), name="sft", strength=0.5)
    trainer = make_trainer(tmp_path, lora(attach={"sft": {"source": sft(), "strength": given}}))
    with pytest.raises(LoRAError, match=rf"set_strength\(model, {given:g}, 'sft'\)"):
        run(trainer, "fit", model)
    assert attached(model) == {"sft": 0.5}


@pytest.mark.parametrize("given", [1e39, pytest.param(10**400, id="10**400"), math.nan])
def test_a_strength_of_the_callback_that_no_forward_can_use_is_refused_when_it_is_made(given: float):
    with pytest.raises(LoRAError, match=r"attach\['sft'\]: a strength must be a finite number in float32"):
        lora(attach={"sft": {"source": sft(), "strength": given}})


class SavesInside(L.Callback):
    """Saves a checkpoint inside of `scaled` and one outside."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / "outside.ckpt")
        with scaled(pl_module, {"": 3.0, "sft": 2.0}):
            trainer.save_checkpoint(folder / "inside.ckpt")


@pytest.mark.parametrize("kind", ["adapter", "full", "merged"])
def test_checkpoint_made_inside_of_scaled_equals_the_one_outside(tmp_path: Path, kind: str):
    callback = lora(save=kind, attach={"sft": {"source": sft(), "strength": 0.5}})
    run(make_trainer(tmp_path, callback, SavesInside()), "fit", Net())
    inside, outside = (torch.load(tmp_path / f"{each}.ckpt", weights_only=True) for each in ("inside", "outside"))
    assert inside["lora"]["beside"] == outside["lora"]["beside"]
    assert inside["lora"]["beside"]["sft"][0] == 0.5
    assert_same_tensors(dict(inside["state_dict"]), dict(outside["state_dict"]))


def injected(strength: float) -> Watched:
    inject(model := Watched(), lora_with_effect().config, seed=2)
    attach(model, sft(), name="sft", strength=strength)
    return model


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_validate_inside_of_scaled_takes_the_model_over_and_acts_with_its_strength(tmp_path: Path, strength: float):
    model, twin = injected(1.0), injected(strength)
    before = outputs(model)
    with scaled(model, strength, "sft"):
        run(make_trainer(tmp_path, lora_with_effect()), "validate", model)
    run(make_trainer(tmp_path, lora_with_effect()), "validate", twin)
    assert model.seen
    assert [loss for _, _, loss in model.seen] == pytest.approx([loss for _, _, loss in twin.seen], rel=1e-5)
    assert torch.equal(outputs(model), before)
    assert attached(model) == {"sft": 1.0}


def test_a_trainer_does_not_load_a_checkpoint_inside_of_scaled(tmp_path: Path):
    trainer = make_trainer(tmp_path, lora(attach={"sft": sft()}))
    run(trainer, "fit", model := Net())
    trainer.save_checkpoint(file := tmp_path / "a.ckpt")
    before = outputs(model)
    with scaled(model, 0.5, "sft"), pytest.raises(LoRAError, match="refused inside"):
        trainer.validate(model, Data(BATCHES), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)
    assert torch.equal(outputs(model), before)


def test_a_strength_in_a_checkpoint_that_no_forward_can_use_is_refused_before_anything_is_taken(tmp_path: Path):
    trainer = make_trainer(tmp_path, lora(attach={"sft": sft()}))
    run(trainer, "fit", model := Net())
    trainer.save_checkpoint(file := tmp_path / "a.ckpt")
    content: dict[str, Any] = torch.load(file, weights_only=True)
    content["lora"]["beside"]["sft"][0] = 1e39
    torch.save(content, file)
    before = outputs(model)
    with pytest.raises(LoRAError, match="adapter: a strength"):
        trainer.validate(model, Data(BATCHES), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)
    assert attached(model) == {"sft": 1.0}
    assert torch.equal(outputs(model), before)
