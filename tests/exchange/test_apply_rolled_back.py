"""A load that failed and was undone: the next adapter loads as onto a model that never saw the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAError,
    adapter_state_dict,
    inject,
    is_merged,
    load_adapter,
    merge,
    unload,
)
from support.models import Zoo, bits, checkpoint, train, zoo_config


class Picky(Zoo):
    """Refuses an extra state that it does not know."""

    note = "known"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        if state["note"] == "unknown":
            raise RuntimeError("an unknown note")


def picky() -> Picky:
    torch.manual_seed(1)
    return Picky().eval()


def trained_picky(unfreeze: bool) -> Picky:
    model = picky()
    inject(model, zoo_config())
    if unfreeze:
        model.norm.weight.requires_grad_(True)
        with pytest.warns(UserWarning, match="unfrozen"):
            adapter_state_dict(model)
    train(model)
    return model.eval()


def overflowing(state: dict[str, Any]) -> None:
    for name in ("body.0.lora_A", "body.0.lora_B"):
        state[name] = torch.full_like(state[name], 1e30)


def refused_by_its_owner(state: dict[str, Any]) -> None:
    state["_extra_state"] = {"note": "unknown"}


@pytest.mark.parametrize("spoil", [overflowing, refused_by_its_owner])
def test_after_a_load_that_was_rolled_back_the_next_adapter_loads_as_on_a_model_that_never_saw_the_first(spoil):
    spoiled = checkpoint(trained_picky(unfreeze=True), "adapter")
    spoil(spoiled["state_dict"])
    good = trained_picky(unfreeze=False)
    model = picky()
    inject(model, zoo_config())
    merge(model)
    before, keys = state_bits_of(model), list(adapter_state_dict(model))
    with pytest.raises((LoRAError, RuntimeError), match=r"not finite|unknown note"):
        load_adapter(model, spoiled)
    assert (state_bits_of(model), list(adapter_state_dict(model))) == (before, keys)
    load_adapter(model, checkpoint(good, "adapter"))
    assert is_merged(model)
    assert state_bits_of(model) == state_bits_of(good)
    unload(model)
    assert state_bits_of(model) == state_bits_of(picky())


def state_bits_of(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
