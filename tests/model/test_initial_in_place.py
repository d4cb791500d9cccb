"""disable_adapter: outputs of the base, no write into tensors that a forward saved, and what is refused inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    lora_param_groups,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_merged,
    take_adapter,
)
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint
from support.covering import covering
from support.models.networks import Zoo, bits, randomise_, state_bits, tokens, train, zoo_config
from support.runs.broken_off import break_off
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import Data, Net, make_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "head": {"modules_to_save": ["head"], "bias": "none"},
    "biases": {"modules_to_save": None, "bias": "all"},
    "dora": {"use_dora": True, "target_modules": ["body.0", "body.3"]},
    "start": {"init_lora_weights": "pissa", "target_modules": ["body.0", "body.3"]},
    "normalisation": {"modules_to_save": ["body.1", "head"]},
}


class Recurrent(nn.Module):
    """Keeps a list of its weights beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.rnn(self.embed(x))[0].mean(1))
        return result


class TiedHead(nn.Module):
    """A table that is trained whole, and the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 0.1 * self.head(self.body(self.embed(x)).tanh().mean(1))
        return result


MODELS: dict[str, tuple[type[nn.Module], LoRAConfig]] = {
    **{name: (Zoo, zoo_config(**options)) for name, options in OPTIONS.items()},
    "recurrent": (Recurrent, LoRAConfig(r=2, target_modules=["head"], modules_to_save=["rnn"])),
    "tied": (TiedHead, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["embed", "head"])),
}


def trained(name: str) -> tuple[nn.Module, nn.Module]:
    """A tuned model in eval mode, and the base that it was."""
    make, config = MODELS[name]
    model = make()
    base = copy.deepcopy(model).eval()
    inject(model, config)
    train(model)
    return model.eval(), base


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- DPO: a reference pass between forward and backward ---


@pytest.mark.parametrize(("name", "backward_inside"), covering([*MODELS], [False, True], meet=1))
def test_a_reference_pass_between_forward_and_backward_gives_the_gradients_of_a_reference_model(name, backward_inside):
    model, base = trained(name)
    identities = {name: id(p) for name, p in model.named_parameters()}
    before, x = state_bits(model), tokens(20)
    policy = model(x)
    with disable_adapter(model):
        reference = model(x)
        assert not reference.requires_grad
        if backward_inside:
            (policy - reference).square().sum().backward()
    if not backward_inside:
        (policy - reference).square().sum().backward()
    assert torch.equal(reference, base(x))
    found = gradients(model)
    model.zero_grad()
    (model(x) - base(x).detach()).square().sum().backward()
    wanted = gradients(model)
    assert found.keys() == wanted.keys() != set()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert identities == {name: id(p) for name, p in model.named_parameters()}
    assert state_bits(model) == before


def test_a_training_forward_inside_leaves_the_statistics_of_the_run_alone():
    model, _ = trained("normalisation")
    before = state_bits(model)
    model.train()
    with disable_adapter(model):
        initial = bits(model.body[1].running_mean)
        model(tokens(4))
        assert bits(model.body[1].running_mean) != initial
    assert state_bits(model) == before
    with disable_adapter(model):
        assert bits(model.body[1].running_mean) == initial


def test_a_cast_inside_is_there_outside():
    model, base = trained("head")
    wanted = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD([model.head.weight], 0.1)
    with disable_adapter(model):
        model.double()
        torch.testing.assert_close(model(tokens(2)), base.double()(tokens(2)))
    assert state_bits(model) == state_bits(wanted)
    assert optimizer.param_groups[0]["params"][0] is model.head.weight


@UNTRAINED_NOTICE
def test_a_trainer_evaluates_the_base_inside(tmp_path):
    """It moves the model to its device, merges and unmerges."""
    config = LoRAConfig(r=2, target_modules=["body.0", "body.3"], modules_to_save=["body.1", "head"])
    model, base = Net(), Net()
    inject(model, config)
    randomise_(model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    before = state_bits(model)

    def score(net: Net) -> Any:
        trainer = make_trainer(tmp_path, LoRACallback(config), logger=False)
        return trainer.validate(net, Data(), verbose=False)

    tuned, wanted = score(model), score(base)
    with disable_adapter(model):
        assert score(model) == wanted != tuned
    assert score(model) == tuned
    assert state_bits(model) == before


# --- what is refused inside ---


REFUSED: dict[str, Callable[[nn.Module, dict[str, Any], Path], Any]] = {
    "state_dict of a wrapper": lambda model, state, path: nn.Sequential(model).state_dict(),
    "load_state_dict of the head": lambda model, state, path: model.head.load_state_dict(
        {"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}
    ),
    "copy and pickle of the head": lambda model, state, path: copy.deepcopy(model.head),
    "copy and pickle of torch.save": lambda model, state, path: torch.save(model, path / "model.pt"),
    "merged_state_dict": lambda model, state, path: merged_state_dict(model),
    "take_adapter": lambda model, state, path: take_adapter(model),
    "save_merged": lambda model, state, path: save_merged(model, path / "merged"),
    "save_checkpoint": lambda model, state, path: convert_checkpoint(model, {"state_dict": state}, "adapter"),
    "load_adapter": lambda model, state, path: load_adapter(model, state),
    "lora_param_groups": lambda model, state, path: lora_param_groups(model, lr=0.1),
    "merge_and_unload": lambda model, state, path: merge_and_unload(model),
}


@pytest.mark.parametrize(("door", "nested"), covering([*REFUSED], [False, True], meet=1))
def test_what_would_save_or_lose_stand_ins_is_refused_inside_and_changes_nothing(tmp_path, door: str, nested: bool):
    model, base = trained("head")
    state = {name: torch.zeros_like(value) for name, value in adapter_state_dict(model).items()}
    before, x = state_bits(model), tokens(5)
    output = model(x)
    with disable_adapter(model), disable_adapter(model) if nested else nullcontext():
        with pytest.raises(LoRAError, match=f"^{door.partition(' of ')[0]}: refused inside `with disable_adapter"):
            REFUSED[door](model, state, tmp_path)
        assert torch.equal(model(x), base(x))
    assert state_bits(model) == before
    assert torch.equal(model(x), output)
    REFUSED[door](model, state, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "normalisation"])
def test_a_block_broken_off_at_any_line_leaves_the_trained_tensors(name: str):
    model, _ = trained(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before, output = state_bits(model), model(tokens(5))

    def block() -> None:
        with disable_adapter(model), disable_adapter(model):
            pass

    line, reached = 0, True
    while reached:
        reached = break_off(block, line := line + 7)
        assert {**dict(model.named_parameters()), **dict(model.named_buffers())}.items() == tensors.items(), line
        assert state_bits(model) == before
        assert torch.equal(model(tokens(5)), output)
    assert line > 100


# --- merge_weights: the mode decides ---


@pytest.mark.parametrize("body", [merged, disable_adapter])
@pytest.mark.parametrize("training", [False, True])
def test_a_mode_set_inside_decides_outside_where_the_mode_merges(body, training):
    model = Zoo()
    inject(model, zoo_config(), merge_weights=True)
    train(model)
    model.train(not training)
    assert is_merged(model) == training
    with body(model):
        model.train(training)
    assert model.training == training
    assert is_merged(model) == (not training)
    with body(model), body(model):
        model.train(not training)
        model.train(training)
    assert is_merged(model) == (not training)


@pytest.mark.parametrize("body", [merged, disable_adapter])
def test_a_mode_set_inside_decides_nothing_where_it_does_not_merge(body):
    model, _ = trained("head")
    with body(model):
        model.train()
    assert not is_merged(model)
    merge(model)
    with body(model):
        model.eval()
    assert is_merged(model)
