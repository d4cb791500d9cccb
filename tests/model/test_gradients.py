"""Adapters that training does not reach are named at the first merge or save after it began, once, and no others."""

from __future__ import annotations

import copy
import gc
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
    inject,
    merge,
    merged_state_dict,
    save_adapter,
    save_merged,
    unmerge,
)
from lightning_lora.model import optimizer_steps

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


@pytest.mark.parametrize("end", ENDS)
def test_layers_without_a_gradient_are_named_once_at_the_first_merge_or_save(tmp_path, end: str):
    model = injected()
    merge(model)  # nothing is known yet
    unmerge(model)
    train(model, sgd(model))
    with pytest.warns(
        UserWarning, match=r"2 of 3 layers: 'decoder', 'unused'\..*exclude_modules=\['decoder', 'unused'\]"
    ):
        ENDS[end](model, tmp_path / "first")
    unmerge(model)
    for later in ENDS:
        ENDS[later](model, tmp_path / later)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("seen", ["all gradients", "no gradient any more"])
def test_an_optimizer_from_before_injection_is_named_at_the_first_merge_or_save(tmp_path, end: str, seen: str):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inject(model, LoRAConfig(r=2, exclude_modules=["decoder", "unused"]))
    train(model, optimizer, decoder=False)
    if seen == "all gradients":
        model(torch.randn(3, D)).sum().backward()
    with pytest.warns(UserWarning, match=r"none of them has changed\. An optimizer that was built before inject"):
        ENDS[end](model, tmp_path / "first")
    ENDS[end](model, tmp_path / "again")


@pytest.mark.parametrize("end", ENDS)
def test_the_warning_shows_the_line_of_the_caller(tmp_path, end: str):
    model = injected()
    train(model, sgd(model))
    with pytest.warns(UserWarning, match="no gradient has reached") as caught:
        ENDS[end](model, tmp_path / "first")
    assert [each.filename for each in caught] == [__file__]


def test_a_copy_and_an_inner_module_are_looked_at_too():
    outer = nn.ModuleDict({"net": Net()})
    inject(outer, LoRAConfig(r=2))
    train(outer["net"], sgd(outer))
    twin = copy.deepcopy(outer)
    for model in (twin, outer["net"]):
        with pytest.warns(UserWarning, match="2 of 3 layers"):
            merge(model)


def test_a_gradient_of_a_factor_that_was_replaced_counts():
    model = injected()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model(torch.randn(3, D)).sum().backward()
    with pytest.warns(UserWarning, match="no gradient has reached the adapters of 2 of 3 layers: 'decoder', 'unused'"):
        merge(model)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["decoder", "unused"]},
        {"exclude_modules": ["decoder", "unused"], "init_lora_weights": False},
        {"exclude_modules": ["decoder", "unused"], "init_lora_weights": "orthogonal"},
    ],
)
def test_training_that_reaches_every_adapter_warns_of_nothing(tmp_path, options: dict[str, Any]):
    model = injected(**options)
    train(model, sgd(model))
    for end in ENDS:
        ENDS[end](model, tmp_path / end)


def test_a_layer_without_a_gradient_is_named_with_factors_that_do_not_start_at_zero():
    model = injected(init_lora_weights=False)
    train(model, sgd(model))
    with pytest.warns(UserWarning, match="2 of 3 layers: 'decoder', 'unused'"):
        merge(model)


def test_an_embedding_without_a_gradient_is_named():
    model = nn.ModuleDict({"embed": nn.Embedding(5, D), "body": nn.Linear(D, D)})
    inject(model, LoRAConfig(r=2, target_modules=["embed", "body"]))
    optimizer = sgd(model)
    model["body"](torch.randn(2, D)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="1 of 2 layers: 'embed'"):
        merge(model)


class Silent:
    """What a layer may have been through that is no fault."""

    @staticmethod
    def nothing(model: Net) -> None:
        pass

    @staticmethod
    def frozen_by_the_user(model: Net) -> None:
        for layer in (model.decoder, model.unused):
            layer.requires_grad_(False)
        train(model, sgd(model))

    @staticmethod
    def gradients_of_zero(model: Net) -> None:
        optimizer = sgd(model)
        output = model(torch.randn(3, D)) + 0 * (model.decoder(torch.ones(D)) + model.unused(torch.ones(D)))
        output.sum().backward()
        optimizer.step()

    @staticmethod
    def loaded_from_elsewhere(model: Net) -> None:
        trained = injected()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
        model.load_state_dict(adapter_state_dict(trained))
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


def test_the_hook_that_notes_a_gradient_is_gone_after_the_first():
    model = injected()
    factor = model.body.lora_B
    assert factor._post_accumulate_grad_hooks
    model(torch.randn(3, D)).sum().backward()
    assert not factor._post_accumulate_grad_hooks
    assert model.body.lora.gradient_arrived
    assert not model.decoder.lora.gradient_arrived


def accumulated(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Gradients of the first of several batches."""
    model(torch.randn(2, D)).sum().backward()


def warming_up(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """One step at a learning rate of 0, after which there are no gradients."""
    optimizer.param_groups[0]["lr"] = 0.0
    accumulated(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()


def skipping(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """A step that a scaler leaves out."""
    accumulated(model, optimizer)
    optimizer.zero_grad()


@pytest.mark.parametrize("begin", [accumulated, warming_up, skipping])
@pytest.mark.parametrize("variant", ["lora", "dora", "vera", "loha"])
@pytest.mark.parametrize("end", ENDS)
def test_a_right_loop_that_begins_slowly_warns_of_nothing(tmp_path, end: str, variant: str, begin: Any):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    inject(model, LoRAConfig(r=1, variant=variant))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    begin(model, optimizer)
    ENDS[end](model, tmp_path / end)


@pytest.mark.parametrize("begin", [accumulated, skipping])
def test_an_optimizer_from_before_injection_is_named_after_its_first_step(begin: Any):
    """A merge before that step neither warns nor ends the watch."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    inject(model, LoRAConfig(r=1))
    begin(model, optimizer)
    merge(model)
    unmerge(model)
    accumulated(model, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"none of them has changed\..* from model\.parameters\(\)\.$"):
        merge(model)


def test_adapters_that_are_all_cut_off_from_the_loss_are_named():
    model = injected(modules_to_save=["unused"])
    optimizer = sgd(model)
    model.unused(model(torch.randn(3, D)).detach()).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no gradient has reached the adapters of 2 of 2 layers"):
        merge(model)


def test_steps_are_noted_only_until_the_layers_were_looked_at_and_of_no_copy():
    model = injected(exclude_modules=["decoder", "unused"])
    record = model.body.lora.injection
    train(model, sgd(model))
    assert id(model.body.lora_B) in record.steps.on_gradients
    assert not any(copy.deepcopy(model).body.lora.injection.steps)
    merge(model)
    assert id(record) not in optimizer_steps._awaited
    unmerge(model)
    gone = injected().body.lora.injection
    assert id(gone) in optimizer_steps._awaited
    key = id(gone)
    del gone
    gc.collect()
    train(model, sgd(model))
    assert key not in optimizer_steps._awaited


def test_models_that_are_gone_are_forgotten_without_a_step():
    """A server that loads adapters makes no optimizer step, at which they could be looked for."""
    gc.collect()
    before = len(optimizer_steps._awaited)
    for _ in range(3):
        injected()
    gc.collect()
    assert len(optimizer_steps._awaited) <= before
