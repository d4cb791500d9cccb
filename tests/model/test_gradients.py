"""Adapters that still have their first values beside others that have not are named at a merge or save, once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    inject,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    take_adapter,
    unmerge,
)
from lightning_lora.model.gradients import explain_missing_gradients

pytestmark = pytest.mark.filterwarnings("error:lightning_lora")

D = 6


class Net(nn.Module):
    """The training loop reads `decoder` from outside; `unused` waits for another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.decoder, self.unused = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(x)
        return result


ENDS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "merge": lambda model, path: merge(model),
    "adapter_state_dict": lambda model, path: adapter_state_dict(model),
    "merged_state_dict": lambda model, path: merged_state_dict(model),
    "save_adapter": save_adapter,
    "save_merged": save_merged,
}


def injected(**options: Any) -> Net:
    model = Net()
    inject(model, LoRAConfig(**{"r": 2, **options}))
    return model


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int = 2, decoder: bool = True) -> None:
    for _ in range(steps):
        output = model(torch.randn(3, D))
        output = F.linear(output, model.decoder.weight) if decoder else output
        output.square().mean().backward()
        optimizer.step()
        model.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)


@pytest.mark.core
@pytest.mark.parametrize("end", ENDS)
def test_layers_with_their_first_values_are_named_once_at_the_first_merge_or_save(tmp_path, end: str):
    model = injected()
    merge(model)  # nothing is known yet
    unmerge(model)
    train(model, sgd(model))
    names = r"'decoder', 'unused'\..*exclude_modules=\['decoder', 'unused'\]"
    with pytest.warns(UserWarning, match=f"not those of 2 of 3 layers: {names}") as caught:
        ENDS[end](model, tmp_path / "first")
    assert [each.filename for each in caught] == [__file__]
    unmerge(model)
    for later in ENDS:
        ENDS[later](model, tmp_path / later)


def test_a_copy_and_an_inner_module_are_looked_at_too():
    outer = nn.ModuleDict({"net": Net()})
    inject(outer, LoRAConfig(r=2))
    train(outer["net"], sgd(outer))
    twin = copy.deepcopy(outer)
    for model in (twin, outer["net"]):
        with pytest.warns(UserWarning, match="2 of 3 layers"):
            merge(model)


@pytest.mark.parametrize("init", [True, False, "orthogonal"])
def test_training_that_reaches_every_adapter_warns_of_nothing(tmp_path, init: Any):
    model = injected(exclude_modules=["decoder", "unused"], init_lora_weights=init)
    train(model, sgd(model))
    for end in ENDS:
        ENDS[end](model, tmp_path / end)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"variant": "loha"}])
def test_each_start_is_told_from_trained_values(options: dict[str, Any]):
    model = injected(**options)
    merge(model)
    unmerge(model)
    train(model, sgd(model))
    with pytest.warns(UserWarning, match="not those of 2 of 3 layers: 'decoder', 'unused'"):
        merge(model)


class Silent:
    """What a layer may have been through that is no fault."""

    @staticmethod
    def frozen_by_the_user(model: Net) -> None:
        for layer in (model.decoder, model.unused):
            layer.requires_grad_(False)
        train(model, sgd(model))

    @staticmethod
    def loaded_from_elsewhere(model: Net) -> None:
        trained = injected()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
        model.load_state_dict(adapter_state_dict(trained), strict=False)
        train(model, sgd(model))

    @staticmethod
    def before_the_first_step(model: Net) -> None:
        sgd(model)
        for layer in (model.body, model.decoder, model.unused):
            layer(torch.ones(D)).sum().backward()

    @staticmethod
    def trained_before_injection(model: Net) -> None:
        model.body.weight.grad = torch.ones(D, D)


@pytest.mark.parametrize("case", [name for name in vars(Silent) if name[0] != "_"])
def test_what_is_no_fault_is_not_warned_of(case: str):
    model = injected()
    getattr(Silent, case)(model)
    merge(model)


def test_the_error_of_a_loss_without_gradients_names_merged_adapters_where_some_are_merged():
    model, x = injected(), torch.randn(3, D)
    for is_merged in (False, True):
        if is_merged:
            merge(model)
        with pytest.raises(RuntimeError, match="does not require grad") as caught, torch.no_grad():
            model(x).sum().backward()
        explain_missing_gradients(caught.value, model)
        assert ("unmerge(model)" in str(caught.value)) == is_merged


# --- attached adapters that no forward reads ---


def attach_to(model: Net, *layers: str, name: str = "sft") -> None:
    options = LoRAConfig(r=2, target_modules=list(layers), init_lora_weights=False)
    plain = Net()
    plain.load_state_dict({each: value for each, value in model.state_dict().items() if "lora_" not in each})
    inject(plain, options)
    attach(model, take_adapter(plain), name=name)


def read(model: Net) -> None:
    F.linear(model(torch.randn(3, D)), model.decoder.weight)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("end", ["merge", "merged_state_dict", "save_merged"])
def test_what_no_forward_reads_beside_what_one_has_read_is_named_once(tmp_path, end: str, trained: bool):
    model = injected(target_modules=["body"]) if trained else Net()
    attach_to(model, "body", "decoder")
    ENDS[end](model, tmp_path / "early")  # nothing is known of a model that has not run
    unmerge(model)
    read(model)
    for each in (copy.deepcopy(model), model):
        with pytest.warns(UserWarning, match=r"attached \('sft'\) to 1 of 2 layers: 'decoder'\. Either") as caught:
            ENDS[end](each, tmp_path / "first")
        assert [one.filename for one in caught] == [__file__]
        ENDS[end](each, tmp_path / "later")


def test_layers_that_were_read_before_another_adapter_was_attached_or_detached_do_not_speak_against_it():
    model = Net()
    attach_to(model, "body")
    model(torch.randn(3, D))
    attach_to(model, "body", "decoder", name="style")
    merge(model)
    unmerge(model)
    read(model)
    model.decoder(torch.randn(3, D))
    detach(model, "style")
    attach_to(model, "unused", name="style")
    merge(model)


def test_what_is_read_merged_is_not_named():
    model = Net()
    attach_to(model, "body", "decoder")
    with merged(model):
        read(model)
    merge(model)
