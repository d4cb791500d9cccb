"""What is known of tensors: found by memory and by place in a module, ended with the adapter, apart for copies."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disable_adapter,
    inject,
    load_adapter,
    merged,
    merged_state_dict,
    save_adapter,
    take_adapter,
    unload,
)
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.facts import facts_of, memory_of
from support.models.networks import randomise_


def adapted(head: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"] if head else None))
    randomise_(model)
    with torch.no_grad():
        model[2].weight.add_(1)
    return model


def test_an_address_is_not_given_again_while_it_is_held():
    held = memory_of(torch.ones(1000))
    gc.collect()
    addresses = {memory.address for _ in range(50) if (memory := memory_of(torch.ones(1000)))}
    assert held is not None
    assert held.address not in addresses


def test_a_tensor_without_memory_is_found_by_its_place_alone():
    assert memory_of(torch.empty(0)) is None
    assert memory_of(torch.empty(2, device="meta")) is not None


def test_unloading_leaves_no_facts_and_a_next_injection_begins_anew():
    model = adapted()
    spare = model[2]
    model[2] = nn.Linear(4, 2)  # what was taken out keeps its facts, which have ended
    with pytest.warns(UserWarning, match="2.weight"):
        unload(model)
    assert all(facts_of(module) is None for module in model.modules())
    model[2] = spare.requires_grad_(False)
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    unload(model)
    assert not model[2].weight.requires_grad
    assert facts_of(model[2]) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_part_of_a_copy_that_gets_another_adapter_leaves_the_rest_its_first_values(copied: Any):
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    first = {name: value.clone() for name, value in net.state_dict().items()}
    inject(net, LoRAConfig(r=2, target_modules=["body.0"], modules_to_save=["head"]))
    with torch.no_grad():
        net["head"].weight.add_(1)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other.load_state_dict({name.removeprefix("body."): v for name, v in first.items() if name.startswith("body.")})
    inject(other, LoRAConfig(r=1, target_modules=["1"], init_lora_weights=False))
    twin = copied(net)
    load_adapter(twin["body"], take_adapter(other))
    with disable_adapter(twin):
        assert torch.equal(twin["head"].weight, first["head.weight"])


class Policy(nn.Module):
    """A policy with a copy of it, as rollout baselines of reinforcement learning make."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.baseline: nn.Module | None = None

    def copy(self) -> None:
        self.baseline = copy.deepcopy(self.policy)


def policy(where: str, *, frozen: bool = True) -> Policy:
    model = Policy()
    inject(model if where == "outside" else model.policy, LoRAConfig(r=2, modules_to_save=["2"], target_modules=["0"]))
    randomise_(model)
    model.copy()
    assert model.baseline is not None
    if frozen:
        model.baseline.requires_grad_(False)
    randomise_(model.baseline, 0.5)
    return model


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_frozen_copy_of_an_adapted_network_is_no_part_of_what_is_trained(where: str, tmp_path):
    model = policy(where)
    plain = model.state_dict()
    names = {name for name in plain if name.startswith("policy") and not name.endswith(("0.weight", "0.bias"))}
    names -= {name for name in plain if ".1." in name and "running" not in name and "num_batches" not in name}
    assert adapter_state_dict(model).keys() == names
    assert not any(name.startswith("baseline") for name in merged_state_dict(model))
    save_adapter(model.policy, tmp_path / "policy")
    save_adapter(model, tmp_path / "all")
    x = torch.randn(5, 4)
    before = model.eval().policy(x)
    with merged(model):
        torch.testing.assert_close(model.policy(x), before)
    load_adapter(model, tmp_path / "all")
    del model.baseline
    save_adapter(model, tmp_path / "without")
    assert open_model(model, "test").copies == ()


def test_a_frozen_copy_that_comes_before_the_trained_network_is_not_taken_for_it():
    model = policy("inside")
    both = nn.ModuleDict({"baseline": model.baseline, "policy": model.policy})
    assert open_model(both, "test").root is model.policy
    assert {name.partition(".")[0] for name in adapter_state_dict(both)} == {"policy"}


def test_a_copy_that_is_trained_counts():
    model = policy("outside", frozen=False)
    assert {"baseline.0.lora_A", "baseline.2.weight"} <= adapter_state_dict(model).keys()


def test_a_loss_that_several_models_share_keeps_nothing_of_them():
    loss = nn.CrossEntropyLoss()
    before = dict(vars(loss))
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "loss": loss, "act": nn.ReLU()})
    inject(model, LoRAConfig(r=2, target_modules=["fc"]))
    assert vars(loss) == before
    assert facts_of(model["act"]) is None
    assert facts_of(model["fc"]) is not None
