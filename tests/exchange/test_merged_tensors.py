"""merged_tensors: merged_state_dict one tensor at a time, in memory of its own, of one adapter or an error."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    attach,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    merged_tensors,
    save_merged,
    scaled,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.model.inject import adapted_layers
from support.covering import covering
from support.models.networks import Zoo, bits, randomise_, zoo_config
from support.models.quantized import adapted, packed_bits, quantized
from support.runs.training import own_random_stream

module_of_merged_tensors = sys.modules["lightning_lora.exchange.merged_tensors"]


def plain() -> Zoo:
    """The same each time."""
    with own_random_stream(1):
        return Zoo().eval()


def zoo(dtype: torch.dtype = torch.float32, **options: Any) -> Zoo:
    """Adapted."""
    model = plain().to(dtype)
    inject(model, zoo_config(**options))
    randomise_(model, 0.3)
    return model


class Tied(nn.Module):
    """Two names of one module, a weight that two modules share, and an LSTM of adapted parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.head.weight = self.table.weight
        self.lstm = nn.LSTM(6, 6)


def tied() -> Tied:
    config = LoRAConfig(r=2, target_modules=["first"], target_parameters=["weight_ih_l0"], modules_to_save=["table"])
    inject(model := Tied(), config)
    randomise_(model, 0.3)
    return model


def other(r: int) -> Adapter:
    return take_adapter(zoo(r=r, bias="none", modules_to_save=None))


def with_other(model: nn.Module) -> nn.Module:
    attach(model, other(3), name="other", strength=0.5)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "float32": zoo,
    "bfloat16": lambda: zoo(torch.bfloat16),
    "DoRA": lambda: zoo(target_modules=["body.0", "body.3"], use_dora=True),
    "PiSSA": lambda: zoo(target_modules=["body.0", "body.3"], init_lora_weights="pissa"),
    "trained rows": lambda: zoo(target_modules=["body.0"], trainable_token_indices={"embed": [1, 4]}),
    "a head alone": lambda: zoo(target_modules=[], bias="none"),
    "tied": tied,
    "one beside": lambda: with_other(zoo()),
    "attached alone": lambda: with_other(plain()),
}


@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.parametrize(("kind", "was_merged"), covering(MODELS, [False, True], meet=1))
def test_they_are_merged_state_dict_and_the_file_of_save_merged_bit_for_bit(
    tmp_path: Path, kind: str, was_merged: bool
):
    model = MODELS[kind]()
    weights = {name: bits(value) for name, value in model.state_dict().items()}
    expected = merged_state_dict(model)
    save_merged(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    merge(model) if was_merged else None
    live = {name: bits(parameter) for name, parameter in model.named_parameters()}
    found = dict(merged_tensors(model))
    assert list(found) == list(expected)
    assert {name: bits(value) for name, value in found.items()} == {name: bits(v) for name, v in expected.items()}
    assert all(bits(found[name]) == bits(value) for name, value in written.items())
    assert {name: bits(parameter) for name, parameter in model.named_parameters()} == live
    assert is_merged(model) == (was_merged and bool(adapted_layers(model)))
    unmerge(model)
    assert {name: bits(value) for name, value in model.state_dict().items()} == weights
    plain = merge_and_unload(model).state_dict()
    assert {name: bits(value) for name, value in found.items()} == {name: bits(v) for name, v in plain.items()}


def test_a_tensor_has_memory_of_its_own():
    model = zoo()
    live = copy.deepcopy(model.state_dict())
    for _, tensor in merged_tensors(model):
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_one_of_them_is_alive_at_a_time():
    model, alive = zoo(), list[weakref.ref[torch.Tensor]]()
    tensors = merged_tensors(model)
    for _ in range(len(merged_state_dict(model))):
        gc.collect()
        assert not any(each() is not None for each in alive)
        alive.append(weakref.ref(next(tensors)[1]))
    with pytest.raises(StopIteration):
        next(tensors)


def step(model: nn.Module) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1).step()


def fused_step(model: nn.Module) -> None:
    """A step of which torch counts no write, to a layer that was taken or is to come."""
    model.get_parameter("body.0.lora_B").data.add_(1.0)


def another_head(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("head.bias").add_(1.0)


def another_adapter(model: nn.Module) -> None:
    load_adapter(model, take_adapter(zoo()))


def another_rank(model: nn.Module) -> None:
    load_adapter(model, take_adapter(zoo(r=3)))


def weaker(model: nn.Module) -> None:
    vars(model)["inside"] = block = scaled(model, 0.0)
    block.__enter__()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a step": step,
    "a fused step": fused_step,
    "the head": another_head,
    "load_adapter": another_adapter,
    "load_adapter of another rank": another_rank,
    "another beside": lambda model: attach(model, other(1), name="second"),
    "a strength": weaker,
    "unload": unload,
    "merge_and_unload": lambda model: merge_and_unload(model) and None,
}


@pytest.mark.parametrize(("change", "taken"), covering(CHANGES, [1, 4, 12], meet=1))
def test_a_change_of_the_adapter_between_two_is_an_error(change: str, taken: int):
    model = zoo()
    tensors = merged_tensors(model)
    for _ in range(taken):
        next(tensors)
    CHANGES[change](model)
    with pytest.raises(LoRAError, match=r"since the first tensor.* begin again"):
        list(tensors)
    with pytest.raises(StopIteration):
        next(tensors)


def test_merging_and_a_forward_between_two_change_nothing():
    model = zoo()
    expected, found = merged_state_dict(model), {}
    for i, (name, tensor) in enumerate(merged_tensors(model)):
        found[name] = tensor
        (unmerge if i % 2 else merge)(model)
        assert torch.is_grad_enabled()
        model(torch.tensor([[1, 2, 3]])).sum().backward()
    unmerge(model)
    assert {name: bits(value) for name, value in found.items()} == {name: bits(v) for name, v in expected.items()}


def test_each_trained_tensor_is_looked_at_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch):
    looks: list[int] = []
    honest = module_of_merged_tensors._writes
    monkeypatch.setattr(module_of_merged_tensors, "_writes", lambda part: looks.append(id(part)) or honest(part))
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(30))
    inject(model, LoRAConfig(r=1))
    attach(model, take_adapter(model), name="other")
    assert len(list(merged_tensors(model))) == 60
    assert max(looks.count(each) for each in set(looks)) == 3  # at the first tensor, at its own, and at the end


def test_what_cannot_be_merged_is_refused_at_the_call():
    inject(model := Tied(), LoRAConfig(r=2, target_modules=["head"]))
    with pytest.raises(LoRAError, match="cannot express the adapter of 'head'"):
        merged_tensors(model)
    with pytest.raises(LoRAError, match="merged_tensors: Linear was not injected"):
        merged_tensors(nn.Linear(2, 2))
    with pytest.raises(LoRAError, match="merged_tensors: dequantize must be one of"):
        merged_tensors(zoo(), dequantize="int8")


# --- quantized bases ---


@pytest.mark.parametrize("kind", ["nf4 nested", "int8", "Float8WeightOnlyConfig", "NF4Tensor"])
def test_quantized_weights_are_dequantized_as_in_merged_state_dict(kind: str):
    model = adapted(kind)
    before = packed_bits(model)
    with pytest.raises(LoRAError, match="is quantized"):
        merged_tensors(model)
    expected = merged_state_dict(model, dequantize="float32")
    found = dict(merged_tensors(model, dequantize="float32"))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert bits(found[name]) == bits(value), name
    assert packed_bits(model) == before


@pytest.mark.parametrize("kind", ["nf4", "int8", "Int8WeightOnlyConfig", "NF4Tensor"])
def test_quantized_weights_that_are_not_adapted_stay_as_they_are(kind: str):
    model = quantized(kind)
    model[0] = torch.nn.Linear(128, 64)
    inject(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    expected = {name: value for name, value in merged_state_dict(model).items() if isinstance(value, torch.Tensor)}
    found = dict(merged_tensors(model))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert bits(as_strided(found[name])) == bits(as_strided(value)), name


def as_strided(tensor: Any) -> torch.Tensor:
    """Return the values of a tensor; of torchao's classes the dequantized ones."""
    if not type(tensor).__module__.startswith("torchao"):
        return tensor
    values: torch.Tensor = (
        tensor.get_original_weight() if hasattr(tensor, "get_original_weight") else tensor.dequantize()
    )
    return values
