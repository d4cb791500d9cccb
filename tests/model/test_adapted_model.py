"""The handle: what it lists, by which names, and that opening one changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError, inject
from lightning_lora.model.adapted_model import find_model, open_model
from lightning_lora.model.named_state import named_state
from lightning_lora.nn.layer_kinds import layer_kinds
from lightning_lora.nn.lora_layer import adapted_layers
from support.models import base_zoo, trained_zoo, zoo_config


class Shared(nn.Module):
    """A network under two names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.first = self.second = network


def test_a_handle_lists_what_the_model_holds_by_first_and_by_every_name():
    model = Shared(trained_zoo())
    handle = open_model(model, "test")
    assert handle.model is model
    assert handle.root is model.first
    assert handle.modules == list(model.named_modules())
    assert handle.places == list(model.named_modules(remove_duplicate=False))
    assert handle.layers == adapted_layers(model)
    assert handle.layers_by_every_name == adapted_layers(model, remove_duplicate=False)
    assert handle.kinds == layer_kinds(model)
    assert [(n, id(t), m) for n, t, m in handle.state()] == [(n, id(t), m) for n, t, m in named_state(model)]
    assert all(name.startswith("first.") for name in handle.initial() if name.endswith("bias"))


def test_a_handle_opened_before_layers_were_adapted_looks_again():
    model = base_zoo()
    assert find_model(model) is None
    with pytest.raises(LoRAError, match=r"^verb: Zoo was not injected"):
        open_model(model, "verb")
    inject(model, zoo_config())
    handle = open_model(model, "verb")
    assert "body.0" in handle.layers
    model.body[0] = nn.Linear(8, 8)
    assert "body.0" in handle.layers
    handle.look_again()
    assert "body.0" not in handle.layers


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_opens_as_the_module_inside(wrap: type[nn.Module]):
    model = trained_zoo()
    assert open_model(nn.DataParallel(model), "test").model is model
    found = find_model(wrap(model))
    assert found is not None
    assert found.layers.keys() == adapted_layers(model).keys()
