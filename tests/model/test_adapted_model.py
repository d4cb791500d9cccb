"""The handle: what it lists, by which names, and that opening one changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import cast

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, disable_adapter, inject, unload
from lightning_lora.model.adapted_model import find_adapted, open_model
from lightning_lora.model.facts import ModuleFacts, facts_of
from lightning_lora.model.live_state import LiveState, open_state
from support.models.networks import base_zoo, zoo_config


def test_a_handle_opened_before_layers_were_adapted_looks_again():
    model = base_zoo()
    assert find_adapted(model) is None
    with pytest.raises(LoRAError, match=r"^verb: Zoo was not injected"):
        open_model(model, "verb")
    inject(model, zoo_config())
    handle = open_model(model, "verb")
    assert "body.0" in handle.layers
    model.body[0] = nn.Linear(8, 8)
    assert "body.0" in handle.layers
    handle.look_again()
    assert "body.0" not in handle.layers


def test_names_of_what_training_changes_are_read_without_a_record_of_what_was_unfrozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    inject(model, LoRAConfig(r=1, target_modules=["0"]))
    model[1].requires_grad_(True)
    handle = open_model(model, "test")
    factors = {"0.lora_A", "0.lora_B"}
    assert set(LiveState(handle).changing) == factors
    assert handle.trained() == set()
    with pytest.warns(UserWarning, match=r"unfrozen after injection \(1\.weight, 1\.bias\)"):
        assert set(open_state(handle).changing) == factors | {"1.weight", "1.bias"}
    assert handle.trained() == {id(model[1].weight), id(model[1].bias)}


# --- what the record keeps lies in the modules ---


class Net(nn.Module):
    """A layer to adapt, one that is trained whole, and a BatchNorm; `net` names them in a model around."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


def injected_net() -> Net:
    torch.manual_seed(0)
    inject(net := Net(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["head", "1"]))
    return net


def train(model: nn.Module) -> None:
    """Change all that training changes."""
    model.train()(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad)


def base_values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Net().state_dict()


def holds(model: nn.Module, values: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in values.items())


MOVES = {
    "another name": lambda net: nn.ModuleDict({"moved": net})["moved"],
    "a deep copy": copy.deepcopy,
    "a pickled copy": lambda net: pickle.loads(pickle.dumps(net)),
    "inside a copy of a module around it": lambda net: copy.deepcopy(nn.ModuleDict({"net": net}))["net"],
}


@pytest.mark.parametrize("move", MOVES)
def test_values_from_before_training_go_where_the_modules_go(move: str):
    net = MOVES[move](injected_net())
    train(net)
    assert not holds(net, base_values())
    with disable_adapter(net):
        torch.testing.assert_close(net.eval()(torch.ones(1, 3)), _output_of_base())
    unload(net)
    assert holds(net, base_values())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(name.startswith("lora") for module in net.modules() for name in vars(module))


def _output_of_base() -> torch.Tensor:
    torch.manual_seed(0)
    result: torch.Tensor = Net().eval()(torch.ones(1, 3))
    return result


def test_a_synchronised_batch_norm_keeps_what_was_kept_of_the_one_before_it():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(injected_net())
    train(net.eval())
    with torch.no_grad():
        net.body[1].running_mean.add_(1)
    unload(net)
    assert isinstance(net.body[1], nn.SyncBatchNorm)
    assert holds(net, base_values())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_new_module_of_the_same_name_has_no_first_values_and_is_named():
    net = injected_net()
    train(net)
    net.head = nn.Linear(3, 2)
    value = net.head.weight.clone()
    assert open_model(net, "test").initial_of().keys() == {"body.1.weight", "body.1.bias"}
    with pytest.warns(UserWarning, match="head.weight"):
        unload(net)
    assert torch.equal(net.head.weight, value)


def test_a_new_module_of_another_shape_has_no_first_values():
    net = injected_net()
    train(net)
    net.head = nn.Linear(3, 5)
    assert open_model(net, "test").initial_of().keys() == {"body.1.weight", "body.1.bias"}
    output = net.head.weight.clone()
    with pytest.warns(UserWarning, match="head.weight"):
        unload(net)
    assert torch.equal(net.head.weight, output)


def test_the_part_that_a_loaded_adapter_is_about_is_told_by_the_module_under_any_name():
    net = nn.ModuleDict({"net": injected_net()})
    assert open_model(net, "test").scope() == "net."
    cast(ModuleFacts, facts_of(net["net"].body)).is_scope = True
    assert open_model(net, "test").scope() == "net.body."
    assert open_model(net["net"], "test").scope() == "body."
    assert open_model(nn.Sequential(net), "test").scope() == "0.net.body."
