"""An evaluation of an adapter that nothing has trained or loaded is one warning; each other evaluation is none."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lora import LoRACallback, load_adapter, take_adapter


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(max_steps=2, callbacks=[LoRACallback(r=2, **options)], barebones=True)


def said_by(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "neither trained nor loaded" in str(each.message)]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("merged_eval", [True, False])
def test_an_untrained_adapter_is_warned_of_once(verb: str, merged_eval: bool):
    (said,) = said_by(lambda: getattr(trainer(merged_eval=merged_eval), verb)(BoringModel()))
    assert "ckpt_path" in said
    assert "load_adapter(model, path)" in said


def test_a_trained_or_loaded_one_is_not_warned_of(tmp_path):
    fitting = trainer()
    model = BoringModel()
    assert not said_by(lambda: (fitting.fit(model), fitting.test(model)))
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    loaded = BoringModel()
    loaded.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    assert not said_by(lambda: trainer().test(loaded, ckpt_path=tmp_path / "a.ckpt"))
    again = BoringModel()
    again.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    load_adapter(again, take_adapter(model))
    assert torch.equal(again.layer.lora_B, model.layer.lora_B)
    assert not said_by(lambda: trainer().test(again))
