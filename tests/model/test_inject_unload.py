"""unload, merge_and_unload, disable_adapter, and loralib's habit of merging by mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.initial_values import snapshot_materialised
from support.models.networks import (
    ZOO_LAYERS,
    Stubborn,
    Zoo,
    bits,
    randomise_,
    state_bits,
    tokens,
    trace,
    train,
    zoo_config,
)

pytestmark = pytest.mark.core

TRAINED = ["head.weight", "head.bias", "conv.bias", "body.0.bias", "body.1.running_mean", "body.1.num_batches_tracked"]


def trained_zoo() -> tuple[Zoo, dict[str, bytes], torch.Tensor]:
    """A trained model, its state dict from before injection and its output in evaluation mode from before training."""
    model = Zoo()
    before = state_bits(model)
    output = model.eval()(tokens())
    inject(model, zoo_config())
    train(model)
    changed = [name for name, value in state_bits(model).items() if before.get(name, value) != value]
    assert set(TRAINED) <= set(changed)  # the test would say nothing about what did not change
    return model, before, output


@pytest.mark.parametrize("state", ["fresh", "trained and merged", "by mode"])
def test_unload_restores_classes_flags_and_every_bit(state):
    model = Stubborn(nn.Linear(4, 4))
    model.zoo.norm.weight.requires_grad_(False)
    before = trace(model)
    config = zoo_config(target_modules=[*ZOO_LAYERS, "linear1", "out_proj"], bias="all")
    inject(model, config, merge_weights=state == "by mode")
    if "trained" in state:
        train_part(model)
    if "merged" in state:
        merge(model)
    if state == "by mode":
        train_part(model)
        model.eval()
        assert is_merged(model)
    unload(model)
    model.train()
    assert trace(model) == before
    with pytest.raises(LoRAError, match=r"unload: Stubborn was not injected; call inject\(model"):
        unload(model)


def train_part(model: Stubborn) -> None:
    train(model.zoo)
    assert bits(model.zoo.body[1].running_mean) != bits(torch.zeros(8))


def test_merge_and_unload_leaves_a_plain_model():
    model, _, _ = trained_zoo()
    expected = model.eval()(tokens())
    weights = merged_state_dict(model)
    untouched = Zoo().eval()
    assert merge_and_unload(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in untouched.named_parameters()
    ]
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {
        n: vars(m).keys() for n, m in untouched.named_modules()
    }
    assert state_bits(model) == {name: bits(tensor) for name, tensor in weights.items()}
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(untouched(tokens()), model(tokens()))


def test_merge_and_unload_refuses_a_weight_that_is_not_finite():
    model, _, _ = trained_zoo()
    with torch.no_grad():
        model.conv.lora_B.fill_(float("inf"))
    was = trace(model)
    with pytest.raises(LoRAError, match="layer 'conv'"):
        merge_and_unload(model)
    assert trace(model) == was


@pytest.mark.parametrize("found", ["unmerged", "merged"])
def test_disable_adapter_is_the_model_before_training_exactly(found):
    model, _, output = trained_zoo()
    model.eval()
    merge(model) if found == "merged" else None
    was, effect = trace(model), model(tokens())
    assert not torch.allclose(effect, output, atol=1e-2)
    with disable_adapter(model) as inside:
        assert inside is model
        assert torch.equal(model(tokens()), output)
        with pytest.raises(ZeroDivisionError), disable_adapter(model):
            1 / 0  # noqa: B018
        assert torch.equal(model(tokens()), output)
    now = trace(model)
    for part in ("parameters", "buffers", "state", *(["modules"] if found == "unmerged" else [])):
        assert now[part] == was[part]  # a merge makes its records anew
    assert is_merged(model) == (found == "merged")
    assert torch.equal(model(tokens()), effect)


@pytest.mark.parametrize(
    ("verb", "found"),
    [(merge, "unmerged"), (unmerge, "merged"), (lambda model: merged(model).__enter__(), "merged")],
)
def test_merging_inside_disable_adapter_does_not_bring_the_adapter_back(found, verb):
    model, _, output = trained_zoo()
    unload(model)
    inject(model, zoo_config(), merge_weights=True)
    train(model)
    expected = copy.deepcopy(model).eval()(tokens())
    model.eval() if found == "merged" else None
    with disable_adapter(model):
        verb(model)
        model.eval()
        assert torch.equal(model(tokens()), output)
    model.eval()
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
    assert is_merged(model)


def test_what_the_user_unfroze_is_saved_and_named_where_its_first_value_is_asked_for():
    model = Zoo()
    before, output = state_bits(model), model.eval()(tokens())
    inject(model, zoo_config())
    model.norm.weight.requires_grad_(True)
    model.body[3].weight.requires_grad_(True)  # an adapted layer's own weight
    train(model)
    trained = {name: bits(model.get_parameter(name)) for name in ("norm.weight", "body.3.weight")}
    with pytest.warns(UserWarning, match=r"unfrozen after injection \(norm.weight, body.3.weight\); they are saved"):
        saved = adapter_state_dict(model)
    assert trained == {name: bits(saved[name]) for name in trained} != {name: before[name] for name in trained}
    names = r"of what was unfrozen after injection \(norm.weight, body.3.weight\), and leaves it as it is"
    with ExitStack() as inside:
        with pytest.warns(UserWarning, match=f"disable_adapter cannot bring back .* {names}") as caught:
            inside.enter_context(disable_adapter(model))
        assert {name: bits(model.get_parameter(name)) for name in trained} == trained
        assert not torch.equal(model.eval()(tokens()), output)
    with pytest.warns(UserWarning, match=f"unload cannot bring back .* {names}") as caught:
        unload(model)
    assert caught[0].filename == __file__
    assert state_bits(model) == before | trained


def test_merge_weights_merges_in_evaluation_mode_at_the_root():
    model = Zoo()
    inject(model, zoo_config(), merge_weights=True)
    assert not is_merged(model)
    train(model)
    weights, factored = state_bits(model), copy.deepcopy(model)
    vars(factored).pop("train")
    expected = factored.eval()(tokens())
    for _ in range(2):
        assert model.eval() is model
        assert is_merged(model)
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
        assert model.train() is model
        assert not is_merged(model)
        assert state_bits(model) == weights
    model.body.eval()  # a part in evaluation mode, as of a frozen backbone, goes on training
    assert not is_merged(model)
    nn.Sequential(model).eval()
    assert not model.training


@pytest.mark.parametrize(
    ("copied", "training"), [(copy.deepcopy, True), (lambda model: pickle.loads(pickle.dumps(model)), False)]
)
def test_merge_weights_works_on_a_copy_as_on_the_original(copied: Callable[[nn.Module], nn.Module], training):
    model = Zoo()
    inject(model, zoo_config(), merge_weights=True)
    randomise_(model)
    model.train(training)
    other = copied(model)
    assert is_merged(other) != training
    other.train(not training)
    assert is_merged(other) == training
    assert is_merged(model) != training
    unload(other)
    assert "train" not in vars(other)
    assert "train" in vars(model)


def test_a_model_injected_on_the_meta_device_keeps_the_values_that_it_was_given_later():
    """What was recorded there has no values."""
    with torch.device("meta"):
        model = Zoo()
    inject(model, zoo_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1)
    base = {name: value for name, value in state_bits(model).items() if "lora_" not in name}
    with disable_adapter(model):
        assert all(bits(parameter) == base[name] for name, parameter in model.named_parameters() if name in base)
    snapshot_materialised(open_model(model, "test"))
    initial = open_model(model, "test").initial()
    assert "head.weight" in initial
    assert {name: bits(value) for name, value in initial.items()}.items() <= base.items()
    unload(model)
    assert state_bits(model) == base
