"""Any module that holds all adapted layers is a handle: the injected one, one around it, or the network inside it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import find_adapted
from lightning_lora.nn.lora_layer import LoRALayer

OPTIONS: dict[str, Any] = {"r": 2, "target_modules": ["0", "2"], "bias": "lora_only"}


class Plan(nn.Module):
    """A library's module around the user's network; it is built anew for each fit."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(x)
        return result


class Deeper(Plan):
    """Another attribute holds it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(nn.Identity())
        self.inner = nn.Sequential(nn.Identity(), network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def train(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.train()(x())  # BatchNorm's statistics
    model.eval()


def x() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 6)


def _injected(wrapper: type[Plan] = Plan) -> tuple[Plan, nn.Sequential]:
    plan = wrapper(net := network())
    inject(plan, LoRAConfig(**OPTIONS))
    train(plan)
    return plan, net


def the_injected_module() -> nn.Module:
    return _injected()[0]


def the_network_inside() -> nn.Module:
    plan, net = _injected()
    net.keeps_alive = lambda: plan  # not a submodule
    return net


def the_network_that_outlives() -> nn.Module:
    _, net = _injected()
    gc.collect()
    return net


def a_new_one_around_the_same_network() -> nn.Module:
    _, net = _injected()
    gc.collect()
    return Plan(net)


def a_new_one_with_other_names() -> nn.Module:
    _, net = _injected()
    gc.collect()
    return Deeper(net)


def a_copy_of_one_around() -> nn.Module:
    return copy.deepcopy(Plan(_injected()[0]))


def a_pickled_network() -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(_injected()[1]))
    return result


HANDLES = [
    the_injected_module,
    the_network_inside,
    the_network_that_outlives,
    a_new_one_around_the_same_network,
    a_new_one_with_other_names,
    a_copy_of_one_around,
    a_pickled_network,
]
handles = pytest.mark.parametrize("handle", HANDLES, ids=lambda make: make.__name__)


def short(names: Any) -> set[str]:
    """Names as the network has them."""
    return {name.rpartition("network.")[2].removeprefix("inner.1.") for name in names}


@handles
def test_every_handle_merges_shows_and_saves_what_the_injected_module_does(
    tmp_path: Path, handle: Callable[[], nn.Module]
):
    model, reference, plain = handle(), the_injected_module(), network().eval()
    record, names = (
        find_adapted(model).injection,
        {name: set(vars(module)) for name, module in model.named_modules()},
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factored = model(x())
    merge(model)
    assert is_merged(model)
    assert torch.allclose(model(x()), factored, atol=1e-5)
    unmerge(model)
    with merged(model):
        assert is_merged(model)
    with disable_adapter(model):
        assert torch.equal(model(x()), plain(x()))
    wanted = {name.removeprefix("network."): value for name, value in adapter_state_dict(reference).items()}
    found = adapter_state_dict(model)
    assert short(found) == wanted.keys()
    assert all(torch.equal(value, wanted[min(short([name]))]) for name, value in found.items())
    assert short(merged_state_dict(model)) == plain.state_dict().keys()
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh := network(), tmp_path / "adapter")
    assert torch.equal(fresh.eval()(x()), reference(x()))
    again = find_adapted(model)
    assert again.injection is record
    assert short(again.initial()) >= {"0.bias", "2.bias", "1.running_mean"}
    assert names == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@handles
def test_every_handle_loads_an_adapter_and_is_plain_after_unload_and_merge_and_unload(
    tmp_path: Path, handle: Callable[[], nn.Module]
):
    reference = the_injected_module()
    with torch.no_grad():
        reference.network[0].lora_B.mul_(3)  # type: ignore[union-attr, operator]
    save_adapter(reference.network, tmp_path / "adapter")  # type: ignore[arg-type]
    load_adapter(model := handle(), tmp_path / "adapter")
    assert torch.equal(model.eval()(x()), reference(x()))
    sum_ = handle()
    wanted = sum_(x())
    merge_and_unload(sum_)
    assert torch.allclose(sum_(x()), wanted, atol=1e-5)
    unload(model)
    assert short(model.state_dict()) == network().state_dict().keys()
    assert torch.equal(model(x()), network().eval()(x()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    for each in (model, sum_):
        assert not any(isinstance(module, LoRALayer) for module in each.modules())
        assert find_adapted(each) is None
    with pytest.raises(LoRAError, match="was not injected"):
        unload(model)


def test_the_record_goes_to_the_module_that_was_used_last_and_back():
    plan, net = _injected()
    new = Deeper(net)
    for model in (new, plan, new):
        found = find_adapted(model)
        assert found is not None
        assert found.root is model
        assert all(model.get_parameter(name).requires_grad for name in found.initial_of())
        with disable_adapter(model):
            assert torch.equal(model(x()), network().eval()(x()))


def test_what_the_new_module_does_not_hold_is_forgotten():
    plan = Plan(net := network())
    plan.head = nn.Linear(4, 2)  # type: ignore[assignment]
    inject(plan, LoRAConfig(r=2, target_modules=["0"], bias="all"))
    del plan
    gc.collect()
    found = find_adapted(new := Deeper(net))
    assert found is not None
    assert found.initial_of().keys() == {"inner.1.0.bias", "inner.1.1.bias", "inner.1.2.bias"}
    unload(new)
    assert torch.equal(new.eval()(x()), network().eval()(x()))


def test_a_part_of_the_adapted_layers_is_no_handle():
    plan, net = _injected()
    part = nn.Sequential(net[0])
    message = r"Sequential holds 1 of the 2 layers that were adapted through Plan, and not 'network\.2'; pass that Plan"
    with pytest.raises(LoRAError, match=message):
        adapter_state_dict(part)
    assert find_adapted(plan) is not None


def test_two_injected_models_in_one_are_refused():
    both = nn.ModuleList([_injected()[0], _injected()[0]])
    with pytest.raises(LoRAError, match="several injected models"):
        adapter_state_dict(both)
    networks = nn.ModuleList([the_network_inside(), the_network_inside()])
    with pytest.raises(LoRAError, match="several injected models"):
        adapter_state_dict(networks)


def test_what_a_new_module_trains_beside_the_network_is_saved_and_told():
    _, net = _injected()
    new = Deeper(net)
    new.body = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"unfrozen after injection \(body.weight, body.bias\)"):
        saved = adapter_state_dict(new)
    assert saved.keys() >= {"body.weight", "body.bias", "inner.1.0.lora_A", "inner.1.0.bias", "inner.1.1.running_mean"}
    assert adapter_state_dict(new).keys() == saved.keys()
    with pytest.warns(UserWarning, match=r"unload cannot bring back .*body.weight, body.bias"):
        unload(new)
    plain = network()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())
