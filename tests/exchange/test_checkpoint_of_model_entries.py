"""A user's own entries in a checkpoint, under names and shapes of parameters: they come back as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    adapter_state_dict,
)
from support.lightning_versions import WeightAveraging, weight_averaging
from support.runs import lora, trained
from support.training import Data, Net, assert_same_tensors, make_trainer

Entry = Callable[[nn.Module], dict[str, Any]]
ENTRIES: dict[str, Entry] = {
    "of one weight": lambda model: {"head.weight": torch.full_like(model.head.weight, 0.5).detach()},
    "of every parameter": lambda model: {n: torch.full_like(p, 0.5).detach() for n, p in model.named_parameters()},
    "nested": lambda model: {
        "tasks": {"first": {"body.3.weight": torch.full_like(model.body[3].weight, 0.5).detach()}}
    },
    "of what is trained": lambda model: {n: t.clone().fill_(1) for n, t in adapter_state_dict(model).items()},
}


class Remembers(Net):
    """Keeps an entry of its own, as for elastic weight consolidation."""

    def __init__(self, entry: str = "of one weight") -> None:
        super().__init__()
        self.entry = entry
        self.found: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fisher"] = ENTRIES[self.entry](self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["fisher"]


class RemembersBeside(L.Callback):
    """The same in a callback's state."""

    def __init__(self, entry: str, model: nn.Module) -> None:
        self.make = functools.partial(ENTRIES[entry], model)

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.make()}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_an_entry_that_the_module_adds_to_a_checkpoint_is_saved_and_comes_back_as_it_was(
    tmp_path, kind: str, entry: str
):
    model = trained(tmp_path, Remembers(entry), lora(save=kind))
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES[entry](model))
    resumed = Remembers(entry)
    make_trainer(tmp_path, lora(save=kind), max_epochs=2).fit(resumed, Data(), ckpt_path=tmp_path / "own.ckpt")
    assert_same_tensors(resumed.found, ENTRIES[entry](model))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_an_entry_in_a_callbacks_state_is_saved_as_it_was(tmp_path, kind: str, entry: str):
    model = Net()
    trained(tmp_path, model, lora(save=kind), RemembersBeside(entry, model))
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["callbacks"]["RemembersBeside"]["fisher"], ENTRIES[entry](model))


@weight_averaging
def test_an_entry_stays_while_the_copies_of_weight_averaging_lose_their_frozen_weights(tmp_path):
    model = trained(tmp_path, Remembers(), lora(), WeightAveraging())
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES["of one weight"](model))
    assert saved["current_model_state"].keys() == saved["state_dict"].keys()
    assert not saved["state_dict"].keys() & dict(Net().named_parameters()).keys()
