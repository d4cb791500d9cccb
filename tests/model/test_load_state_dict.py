"""load_state_dict on an injected model: a complete base with an adapter or without; any part of one is an error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merged_state_dict,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import (
    ZOO_LAYERS,
    Zoo,
    base_zoo,
    bits,
    randomise_,
    state_bits,
    tokens,
    train,
    trained_zoo,
    zoo_config,
)

FACTORS = {f"{layer}.{factor}" for layer in ZOO_LAYERS for factor in ("lora_A", "lora_B")}
PATHS = ["", "body", "conv"]


def adapted(seed: int, state: str = "unmerged") -> Zoo:
    """A model whose every value depends on the seed, adapters and buffers included."""
    torch.manual_seed(seed)
    model = Zoo()
    with torch.no_grad():
        model.norm.weight.uniform_(), model.norm.bias.uniform_()
        model.body[1].weight.uniform_(), model.body[1].bias.uniform_()
    inject(model, zoo_config())
    train(model, steps=seed)
    merge(model) if state == "merged" else None
    return model.eval()


def named(model: nn.Module, what: str) -> set[str]:
    state = set(model.state_dict())
    return {"base": state - FACTORS, "adapter": set(adapter_state_dict(model)), "both": state}[what]


def pick(model: nn.Module, values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """A state dict of the model with these names alone, and what torch notes beside them."""
    state = model.state_dict()
    for name in list(state):
        del state[name]
    for name in sorted(keys):
        state[name] = values[name].clone()
    return state


def under(path: str, state: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


SOURCE = adapted(1)
STATE = {name: tensor.clone() for name, tensor in SOURCE.state_dict().items()}


@pytest.mark.parametrize(
    ("path", "what", "state", "assign"),
    covering(PATHS, ["base", "adapter", "both"], ["unmerged", "merged"], [False, True]),
)
def test_a_complete_base_or_both_load_strictly_into_any_part_and_an_adapter_not_strictly(path, what, state, assign):
    model = adapted(2, state)
    keys = named(model, what)
    before = state_bits(model)
    assert not any(before[name] == bits(STATE[name]) for name in before)
    names = set(under(path, dict.fromkeys(keys)))
    target = model.get_submodule(path)
    given_state = pick(target, under(path, STATE), names)
    if what == "adapter":
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
            copy.deepcopy(target).load_state_dict(given_state, assign=assign)
    result = target.load_state_dict(given_state, assign=assign, strict=what != "adapter")
    assert set(result.missing_keys) == (set(target.state_dict()) - names if what == "adapter" else set())
    assert not result.unexpected_keys
    assert set(given_state) == names  # the caller's dictionary is left alone
    prefix = f"{path}." if path else ""
    loaded = {prefix + name for name in names}
    expected = {name: bits(STATE[name]) if name in loaded else value for name, value in before.items()}
    assert state_bits(model) == expected
    assert is_merged(model) == (state == "merged")
    assert model.conv.lora_A.requires_grad
    assert not model.conv.weight.requires_grad
    unmerge(model)
    assert state_bits(model) == expected


KEYS = st.sampled_from(sorted(STATE))


@settings(max_examples=40)
@given(
    start=st.sampled_from(["base", "adapter", "both", "nothing"]),
    toggled=st.sets(KEYS, min_size=1, max_size=3) | st.sets(KEYS, min_size=1),
    state=st.sampled_from(["unmerged", "merged"]),
    place=st.sampled_from([("", False), ("", True), ("body", False), ("body.0", False)]),
)
def test_loading_any_part_of_base_or_adapter_strictly_is_an_error(start, toggled, state, place):
    path, wrapped = place
    model = MODELS[state]
    keys = (named(model, start) if start != "nothing" else set()) ^ toggled
    keys = set(under(path, dict.fromkeys(keys)))
    whole = {what: set(under(path, dict.fromkeys(named(model, what)))) for what in ("base", "both")}
    assume(keys not in whole.values())
    values = under(path, STATE)
    target = model.get_submodule(path)
    if wrapped:
        target, values = nn.Sequential(target), {f"0.{name}": value for name, value in values.items()}
        keys = {f"0.{name}" for name in keys}
    given_state = pick(target, values, keys)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        target.load_state_dict(given_state)


MODELS = {state: adapted(1, state) for state in ("unmerged", "merged")}


# --- a base loaded after injection is the new start ---


@pytest.mark.parametrize(
    ("state", "assign", "path"), covering(["unmerged", "merged"], [False, True], ["", "body"], meet=1)
)
def test_a_base_loaded_after_injection_is_what_unload_brings_back(state, assign, path):
    torch.manual_seed(5)
    pretrained = Zoo()
    train(pretrained)  # so that its buffers are not the initial ones either
    model = Zoo()
    inject(model, zoo_config())
    expected = copy.deepcopy(model)
    unload(expected)
    base = {name: tensor.clone() for name, tensor in pretrained.get_submodule(path).state_dict().items()}
    expected.get_submodule(path).load_state_dict(base)
    output = expected.eval()(tokens())

    randomise_(model)
    merge(model) if state == "merged" else None
    model.get_submodule(path).load_state_dict({k: v.clone() for k, v in base.items()}, assign=assign)
    with disable_adapter(model.eval()):
        assert torch.equal(model(tokens()), output)
    unmerge(model)
    train(model)
    model.eval()
    assert not torch.equal(model(tokens()), output)
    with disable_adapter(model):
        assert torch.equal(model(tokens()), output)
    unload(model)
    assert state_bits(model) == state_bits(expected)
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {
        n: vars(m).keys() for n, m in expected.named_modules()
    }


def test_unload_brings_back_the_latest_of_several_loaded_bases():
    torch.manual_seed(5)
    first, second, model = Zoo(), Zoo(), Zoo()
    train(first), train(second)
    inject(model, zoo_config())
    model.body[0].load_state_dict(first.body[0].state_dict())
    model.body.load_state_dict(second.body.state_dict())
    (part := copy.deepcopy(model)).train()
    unload(part)
    assert state_bits(part.body) == state_bits(second.body)
    model.conv.load_state_dict(second.conv.state_dict())
    model.load_state_dict(first.state_dict())
    model.body[3].load_state_dict(second.body[3].state_dict())
    train(model)
    unload(model)
    expected = copy.deepcopy(first)
    expected.body[3].load_state_dict(second.body[3].state_dict())
    assert state_bits(model) == state_bits(expected)


def test_loading_an_adapter_does_not_change_what_unload_brings_back():
    torch.manual_seed(6)
    model = Zoo()
    before = state_bits(model)
    inject(model, zoo_config())
    model.load_state_dict({name: STATE[name] for name in named(model, "adapter")}, strict=False)
    unload(model)
    assert state_bits(model) == before


# --- prefixes, wrappers, copies ---

WRAPPED: dict[str, Callable[[Zoo], nn.Module]] = {
    "itself": lambda model: model,
    "a deepcopy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "a part": lambda model: model.body,
    "a layer": lambda model: model.body[0],
    "a new module around a part": lambda model: nn.ModuleDict({"net": model.body}),
    "a new module around a layer": lambda model: nn.Sequential(nn.ReLU(), model.conv),
    "a part in a wrapper": lambda model: wrap_body(model, checkpoint_wrapper),
    "a compiled part": lambda model: wrap_body(model, lambda body: torch.compile(body, backend="eager")),
}


def wrap_body(model: Zoo, wrap: Callable[[nn.Module], Any]) -> Zoo:
    model.body = wrap(model.body)
    return model


@pytest.mark.core
@pytest.mark.parametrize(
    ("wrap", "state", "assign"), covering([*WRAPPED], ["unmerged", "merged"], [False, True], meet=1)
)
def test_a_base_loads_strictly_wherever_the_layers_are(wrap, state, assign):
    target = WRAPPED[wrap](adapted(2, state))
    before = state_bits(target)
    base = {name: torch.ones_like(value) for name, value in target.state_dict().items() if "lora_" not in name}
    assert base.keys() < before.keys()
    expected = before | {name: bits(value) for name, value in base.items()}  # assigned tensors are then merged, too
    target.load_state_dict(base, assign=assign)
    assert state_bits(target) == expected


def test_layers_whose_factors_are_missing_beside_others_are_named_once():
    state = {name: value for name, value in STATE.items() if not name.startswith("conv.lora")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "conv.lora_A", "conv.lora_B"\. $'):
        adapted(2).load_state_dict(state)
    assert adapted(2).load_state_dict(state, strict=False).missing_keys == ["conv.lora_A", "conv.lora_B"]


def test_loading_a_model_with_an_injected_part_is_strict_about_the_rest():
    model = nn.ModuleDict({"inner": adapted(2), "rest": nn.Linear(2, 2)})
    rest = {f"rest.{name}": torch.zeros_like(tensor) for name, tensor in model["rest"].state_dict().items()}
    for what in ("base", "both"):
        keys = named(model["inner"], what)
        model.load_state_dict({f"inner.{name}": STATE[name] for name in keys} | rest)
        with pytest.raises(RuntimeError, match=r"rest\.weight"):
            model.load_state_dict({f"inner.{name}": STATE[name] for name in keys})
    model.load_state_dict(adapter_state_dict(model), strict=False)
    assert state_bits(model["inner"]) == {name: bits(tensor) for name, tensor in STATE.items()}


def test_a_base_of_another_shape_changes_nothing_that_unload_brings_back():
    model = trained_zoo()
    initial = {name: value.clone() for name, value in open_model(model, "test").initial().items()}
    base = base_zoo().state_dict() | {"head.weight": torch.zeros(4, 8)}
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        model.load_state_dict(base)
    assert torch.equal(open_model(model, "test").initial()["head.weight"], initial["head.weight"])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    torch.save(state, stored := io.BytesIO())
    stored.seek(0)
    return torch.load(stored, weights_only=True)


@pytest.mark.core
@pytest.mark.parametrize(
    ("carry", "state", "strict"),
    [(lambda state: state, "unmerged", True), (copy.deepcopy, "merged", False), (through_a_file, "merged", True)],
)
def test_merged_weights_are_not_loaded_under_an_adapter_which_would_be_added_twice(carry, state, strict):
    model = adapted(1, state)
    before, weights = state_bits(model), carry(merged_state_dict(model))

    with pytest.raises(LoRAError, match=r"load_state_dict: the state dict holds merged weights.* a second time"):
        model.load_state_dict(weights, strict=strict)

    assert state_bits(model) == before
    (plain := Zoo()).load_state_dict(weights)
    assert torch.equal(plain.eval()(tokens()), (model if is_merged(model) else merged_copy(model))(tokens()))
    model.load_state_dict(named_values(model, "base"))  # a base is no sum, whether it came from a merged model or not


def test_merged_weights_are_the_base_of_an_adapter_that_is_not_trained_yet():
    weights, fresh = merged_state_dict(adapted(1, "unmerged")), Zoo().eval()
    inject(fresh, LoRAConfig(r=2))
    (plain := Zoo().eval()).load_state_dict(weights)
    fresh.load_state_dict(weights)
    assert torch.equal(fresh(tokens()), plain(tokens()))


def merged_copy(model: Zoo) -> Zoo:
    merge(twin := copy.deepcopy(model))
    return twin


def named_values(model: Zoo, what: str) -> dict[str, Any]:
    return {name: model.state_dict()[name] for name in named(model, what)}
