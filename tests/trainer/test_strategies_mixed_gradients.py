"""Trained and frozen parameters side by side: adapters, biases of their layers, a layer trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback, LoRAError, disable_adapter
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import Plain, Sharded, data, loader, make_trainer, model_parallel, whole, whole_state
from support.ranks.sharded_adapters import assert_same_bits
from support.runs.training import seen

FROZEN = ["net.0.weight", "net.2.weight"]
TRAINED = {"net.0.bias", "net.2.bias", "net.4.weight", "net.4.bias"}
FACTORS = {f"net.{layer}.lora_{leaf}" for layer in (0, 2) for leaf in "AB"}


def lora() -> LoRACallback:
    return LoRACallback(r=2, target_modules=["0", "2"], modules_to_save=["4"], bias="lora_only")


def trainer(path: Path, kind: type[Plain], epochs: int) -> Any:
    if kind is Plain:
        strategy = DDPStrategy(process_group_backend=BACKEND)
        return make_trainer(path, lora(), devices=2, strategy=strategy, max_epochs=epochs)
    return model_parallel(path, lora(), max_epochs=epochs)


def fit(path: Path, kind: type[Plain]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, again = kind(), kind()
    initial = whole_state(model)
    trainer(path, kind, 3).fit(model, *data())
    state = whole_state(model)
    if kind is Plain:
        with disable_adapter(model):
            inside = {name: value for name, value in whole(seen(model)).items() if name in initial}
        assert_same_bits(inside, initial)
    else:
        with pytest.raises(LoRAError, match=r"disable_adapter: 'net\.0\.bias' is trained and sharded"):
            disable_adapter(model).__enter__()
        assert_same_bits(whole_state(model), state)
    torch.manual_seed(0)  # the same A
    first = trainer(path, kind, 2)
    first.fit(again, *data())
    first.save_checkpoint(path / "2.ckpt")
    again = kind()
    trainer(path, kind, 3).fit(again, *data(), ckpt_path=path / "2.ckpt")
    assert_same_bits(whole_state(again), state)
    return model.losses, state


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Sharded, Plain], ids=["fsdp2", "ddp"])
def test_trained_and_frozen_parameters_side_by_side_equal_one_device(tmp_path, kind):
    alone = Plain()
    initial = whole_state(alone)
    make_trainer(tmp_path, lora()).fit(alone, loader(), loader(seed=6))
    expected = whole_state(alone)
    for losses, state in world().run(fit, tmp_path, kind):
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
        assert_same_bits({name: state[name] for name in FROZEN}, {name: initial[name] for name in FROZEN})
        assert all(not torch.equal(state[name], initial[name]) for name in TRAINED)
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == TRAINED | FACTORS
