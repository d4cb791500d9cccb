"""disable_adapter: outputs of the base, no write into tensors that a forward saved, and saves inside it."""

from __future__ import annotations

import copy
import pickle
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
    save_merged,
    unload,
)
from support.models import Zoo, bits, state_bits, tokens, train, zoo_config

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


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", MODELS)
def test_steps_with_a_reference_pass_equal_steps_with_a_reference_model(name):
    model, base = trained(name)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    plain = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 0.01)
    for step in range(3):
        x = tokens(step)
        policy = model(x)
        with disable_adapter(model), torch.no_grad():
            reference = model(x)
        (policy - reference).square().sum().backward()
        (other(x) - base(x).detach()).square().sum().backward()
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_gradients_of_a_step_with_a_reference_pass_are_those_of_float64():
    model, base = trained("head")
    wide, wide_base, x = copy.deepcopy(model).double(), copy.deepcopy(base).double(), tokens(3)
    policy = model(x)
    with disable_adapter(model):
        reference = model(x)
    (policy - reference).square().sum().backward()
    (wide(x) - wide_base(x).detach()).square().sum().backward()
    for name, wanted in gradients(wide).items():
        torch.testing.assert_close(gradients(model)[name].double(), wanted, rtol=1e-3, atol=1e-5)


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


def test_a_compiled_model_is_the_base_inside():
    model, base = trained("head")
    compiled, x = torch.compile(model, backend="eager"), tokens(2)
    tuned = model(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), tuned)
        with disable_adapter(model):
            torch.testing.assert_close(compiled(x), base(x))


def test_a_cast_inside_is_there_outside():
    model, base = trained("head")
    wanted = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD([model.head.weight], 0.1)
    with disable_adapter(model):
        model.double()
        torch.testing.assert_close(model(tokens(2)), base.double()(tokens(2)))
    assert state_bits(model) == state_bits(wanted)
    assert optimizer.param_groups[0]["params"][0] is model.head.weight


# --- what is saved and loaded inside ---


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_inside_are_those_outside(name):
    model, _ = trained(name)
    takers = state_bits, adapter_state_dict, merged_state_dict, lambda each: each.state_dict(keep_vars=True)
    outside = [{n: bits(v) if isinstance(v, torch.Tensor) else v for n, v in take(model).items()} for take in takers]
    with disable_adapter(model), disable_adapter(model):
        inside = [{n: bits(v) if isinstance(v, torch.Tensor) else v for n, v in take(model).items()} for take in takers]
        kept = model.state_dict(keep_vars=True)
    assert inside == outside
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    assert not any(hooks for m in model.modules() for hooks in (m._state_dict_hooks, m._load_state_dict_post_hooks))


@pytest.mark.parametrize("name", ["head", "biases", "normalisation"])
def test_what_is_saved_inside_is_the_tuned_model(name, tmp_path):
    model, base = trained(name)
    x = tokens(9)
    wanted = model(x)
    with disable_adapter(model):
        save_adapter(model, tmp_path / "adapter")
        save_merged(model, tmp_path / "merged")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(x), wanted)
    from safetensors.torch import load_file

    base.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"), strict=False)
    torch.testing.assert_close(base(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [load_adapter, lambda m, s: m.load_state_dict(s)], ids=["load_adapter", "torch's"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_loaded_inside_is_there_outside_and_not_before(name, load):
    model, base = trained(name)
    wanted, state = copy.deepcopy(model), {n: v.clone() for n, v in adapter_state_dict(model).items()}
    train(model, 1)
    model.eval()
    identities, x = {n: id(p) for n, p in model.named_parameters()}, tokens(5)
    assert not torch.equal(model(x), wanted(x))
    with disable_adapter(model):
        load(model, state)
        assert torch.equal(model(x), base(x))
    assert state_bits(model) == state_bits(wanted)
    assert torch.equal(model(x), wanted(x))
    assert identities == {n: id(p) for n, p in model.named_parameters()}


def test_another_base_loaded_inside_is_the_base_inside():
    model, _ = trained("head")
    other = Zoo().eval()
    with disable_adapter(model):
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(tokens(5)), other(tokens(5)))
    unload(model)
    assert state_bits(model) == state_bits(other)


@pytest.mark.parametrize("found_merged", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_unload_inside_leaves_the_base_inside_and_outside(name, found_merged):
    model, base = trained(name)
    merge(model) if found_merged else None
    with disable_adapter(model), disable_adapter(model):
        unload(model)
        assert torch.equal(model(tokens(5)), base(tokens(5)))
    assert state_bits(model) == state_bits(base)
    assert all(
        vars(module).keys() == vars(plain).keys() for module, plain in zip(model.modules(), base.modules(), strict=True)
    )
    inject(model, MODELS[name][1])
    train(model)


def test_an_injection_made_inside_after_unload_is_not_touched_outside():
    model, _ = trained("head")
    with disable_adapter(model):
        unload(model)
        inject(model, LoRAConfig(r=3))
        train(model)
        before = state_bits(model)
    assert state_bits(model) == before
    assert model.body[0].lora_active


def test_merge_and_unload_inside_is_refused_and_changes_nothing():
    model, _ = trained("head")
    before, output = state_bits(model), model(tokens(5))
    with disable_adapter(model), pytest.raises(LoRAError, match="merge_and_unload: the adapters are disabled, inside"):
        merge_and_unload(model)
    assert state_bits(model) == before
    assert torch.equal(model(tokens(5)), output)
    torch.testing.assert_close(merge_and_unload(model)(tokens(5)), output)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_is_the_base_and_keeps_the_trained_values(copied):
    model, base = trained("normalisation")
    with disable_adapter(model):
        other = copied(model)
    assert torch.equal(other(tokens(5)), base(tokens(5)))
    assert state_bits(other) == state_bits(model)
    unload(other)
    assert state_bits(other) == state_bits(base)


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


def test_gradients_reach_the_adapters_after_train_inside_merged():
    model = Zoo()
    inject(model, zoo_config(), merge_weights=True)
    train(model)
    model.eval()
    with merged(model):
        model.train()
    model(tokens(3)).square().mean().backward()
    assert model.body[0].lora_B.grad is not None
