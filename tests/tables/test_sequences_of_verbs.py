"""Verbs in any order: after each the base is intact, and outputs are those of a plain model built by hand."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lightning_lora import (
    LoRAError,
    adapter_state_dict,
    attach,
    attached,
    detach,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from support.models.networks import ZOO_LAYERS, Zoo, bits, state_bits, tokens, train, zoo_config

MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function
BUDGET = MERGE.COPY_BUDGET
NAMES, WEIGHTS = st.sampled_from(["x", "y", "z"]), st.sampled_from([0.0, 0.5, 1.0, -0.5])
Deltas = dict[str, torch.Tensor]  # by layer, in float64


def deltas(tensors: Mapping[str, torch.Tensor]) -> Deltas:
    """What an adapter adds to each weight: s * B @ A, with s = 4 as of rank 2."""
    found = {}
    for layer in ZOO_LAYERS:
        a, b = (tensors[f"{layer}.{leaf}"].detach().double() for leaf in ("lora_A", "lora_B"))
        product = (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
        found[layer] = 4 * (product.T if layer == "embed" else product)
    return found


def move(model: Any, how: str) -> None:
    """Rename the parts of the body, slice it, or wrap the layer of this name."""
    if how == "rename":
        model.body = nn.Sequential(OrderedDict((f"part{name}", part) for name, part in model.body.named_children()))
    elif how == "slice":
        model.body = model.body[:]
    else:
        set_layer(model, how, nn.Sequential(model.get_submodule(how)))


def move_back(model: Any, how: str) -> None:
    if how in ("rename", "slice"):
        model.body = nn.Sequential(*model.body)
    else:
        set_layer(model, how, model.get_submodule(how)[0])


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, layer)


class Verbs(RuleBasedStateMachine):
    """`base` is a plain model with what unload has to bring back; `merged` says what is_merged has to say.

    `beside` has the weight and the deltas of each attached adapter.
    """

    beside: dict[str, tuple[float, Deltas]]

    @initialize(by_mode=st.booleans(), seed=st.integers(0, 9), copies=st.booleans())
    def start(self, by_mode: bool, seed: int, copies: bool) -> None:
        torch.manual_seed(seed)
        MERGE.COPY_BUDGET = BUDGET if copies else 0
        self.model, self.by_mode, self.merged, self.beside = Zoo().eval(), by_mode, False, {}
        self.base = copy.deepcopy(self.model)
        inject(self.model, zoo_config(), merge_weights=by_mode)

    def teardown(self) -> None:
        MERGE.COPY_BUDGET = BUDGET

    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        unmerge(self.model)  # as the callback does before a batch
        train(self.model, steps)
        self.model.eval()
        self.merged = self.by_mode

    @rule()
    def merge(self) -> None:
        merge(self.model)
        self.merged = True

    @rule()
    def unmerge(self) -> None:
        unmerge(self.model)
        self.merged = False

    @rule(through_pickle=st.booleans())
    def copy(self, through_pickle: bool) -> None:
        self.model = pickle.loads(pickle.dumps(self.model)) if through_pickle else copy.deepcopy(self.model)

    @rule()
    def swap_two_layers(self) -> None:
        for net in (self.model, self.base):
            net.body[0], net.body[3] = net.body[3], net.body[0]
        for _, found in self.beside.values():
            found["body.0"], found["body.3"] = found["body.3"], found["body.0"]

    @rule(
        how=st.sampled_from([*ZOO_LAYERS, "rename", "slice"]),
        verb=st.sampled_from(["merge", "unmerge", "deepcopy", "pickle", "train"]),
    )
    def move_parts_and_move_them_back(self, how: str, verb: str) -> None:
        output = self.model(tokens())
        move(self.model, how)
        if verb in ("deepcopy", "pickle"):
            self.copy(through_pickle=verb == "pickle")
        elif verb == "train":
            self.train(steps=1)
        else:
            getattr(self, verb)()
        if verb == "train":
            output = self.model(tokens())
        with merged(self.model):
            torch.testing.assert_close(self.model(tokens()), output, rtol=1e-4, atol=1e-5)
        with disable_adapter(self.model):
            assert torch.equal(self.model(tokens()), self.base(tokens()))
        move_back(self.model, how)

    @rule(seed=st.integers(10, 19), assign=st.booleans())
    def load_a_base(self, seed: int, assign: bool) -> None:
        torch.manual_seed(seed)
        self.base = Zoo().eval()
        self.model.load_state_dict(copy.deepcopy(self.base.state_dict()), assign=assign)

    @rule()
    def cast_and_back(self) -> None:
        self.model.double().float()

    @rule(by_torch=st.booleans())
    def take_the_adapter_to_a_fresh_model(self, by_torch: bool) -> None:
        fresh = copy.deepcopy(self.base)
        inject(fresh, zoo_config(), merge_weights=self.by_mode)
        state = adapter_state_dict(self.model)
        if self.beside:
            with pytest.raises(LoRAError, match="not attached here"):
                fresh.load_state_dict(state, strict=False)
            state = dict(state)  # does not say what was attached
        fresh.load_state_dict(state, strict=False) if by_torch else load_adapter(fresh, state)
        self.model, self.merged, self.beside = fresh, False, {}

    @rule()
    def inject_again(self) -> None:
        assert inject(self.model, zoo_config(), merge_weights=self.by_mode) == ZOO_LAYERS

    @rule()
    def unload(self) -> None:
        unload(self.model)
        assert state_bits(self.model) == state_bits(self.base)
        self.weights_are_right(self.model, {})
        inject(self.model, zoo_config(), merge_weights=self.by_mode)
        self.merged = False

    @rule()
    def merge_and_unload(self) -> None:
        expected = {name: bits(tensor) for name, tensor in merged_state_dict(self.model).items()}
        self.base = merge_and_unload(self.model)
        assert state_bits(self.base) == expected
        self.model, self.merged, self.beside = copy.deepcopy(self.base), False, {}
        inject(self.model, zoo_config(), merge_weights=self.by_mode)

    @rule(name=NAMES, weight=WEIGHTS, seed=st.integers(20, 29))
    def attach(self, name: str, weight: float, seed: int) -> None:
        other = copy.deepcopy(self.base)
        inject(other, zoo_config(modules_to_save=None, bias="none", init_lora_weights=False), seed=seed)
        with torch.no_grad():
            for name_of_factor, factor in other.named_parameters():
                factor *= 0.1 if "lora_B" in name_of_factor else 1
        adapter = take_adapter(other)
        if name in self.beside:
            with pytest.raises(LoRAError, match="is attached already"):
                attach(self.model, adapter, name=name)
            return
        assert attach(self.model, adapter, name=name, strength=weight) == ZOO_LAYERS
        self.beside[name] = weight, deltas(adapter.tensors)

    @rule(seed=st.integers(30, 39), use_dora=st.booleans(), modules_to_save=st.sampled_from([["head"], ["norm"], None]))
    def swap_the_adapter_and_swap_back(self, seed: int, **options: Any) -> None:
        other, kept, output = copy.deepcopy(self.base), take_adapter(self.model), self.model(tokens())
        inject(other, zoo_config(r=3, init_lora_weights=False, **options), seed=seed)
        load_adapter(self.model, take_adapter(other))
        assert is_merged(self.model) == self.merged
        if not self.beside:
            torch.testing.assert_close(self.model(tokens()), other(tokens()), rtol=1e-4, atol=1e-5)
        with disable_adapter(self.model):
            assert torch.equal(self.model(tokens()), self.base(tokens()))
        load_adapter(self.model, kept)
        assert torch.equal(self.model(tokens()), output)

    @precondition(lambda self: self.beside)
    @rule(data=st.data(), weight=WEIGHTS)
    def set_strength(self, data: st.DataObject, weight: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.beside)))
        set_strength(self.model, weight, name)
        self.beside[name] = weight, self.beside[name][1]

    @precondition(lambda self: self.beside)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.beside)))
        detach(self.model, name)
        del self.beside[name]

    @rule(strength=WEIGHTS, name=st.sampled_from(["", "x", "y", "z"]), seed=st.integers(0, 9))
    def verbs_inside_of_scaled(self, strength: float, name: str, seed: int) -> None:
        if name not in ("", *self.beside):
            with pytest.raises(LoRAError), scaled(self.model, strength, name):
                pass
            return
        if not name and strength not in (0.0, 1.0):  # of a trained head there is none in between
            with pytest.raises(LoRAError, match="no strength between"), scaled(self.model, strength):
                pass
            return
        with scaled(self.model, strength, name):
            self.changes_are_refused()
            if name or strength:
                kept = take_adapter(self.model)
                again = copy.deepcopy(self.model)
            elif not name:
                with pytest.raises(LoRAError, match="refused inside"):
                    take_adapter(self.model)
                return
            with scaled(self.model, 0.0), disable_adapter(self.model):
                assert torch.equal(self.model(tokens()), self.base(tokens()))
            merge(self.model) if seed % 2 else unmerge(self.model)
        assert attached(again) == attached(self.model)
        assert {each: value.strength for each, value in kept.attached.items()} == attached(self.model)
        unmerge(again)
        self.model(tokens())

    @rule()
    def verbs_inside_of_disable_adapter(self) -> None:
        with disable_adapter(self.model):
            self.changes_are_refused()
            with pytest.raises(LoRAError, match="refused inside"):
                copy.deepcopy(self.model)

    def changes_are_refused(self) -> None:
        calls: list[Callable[[], object]] = [lambda: unload(self.model), lambda: merge_and_unload(self.model)]
        calls += [lambda: self.model.load_state_dict(self.base.state_dict())]
        calls += [lambda name=name: detach(self.model, name) for name in self.beside]
        for call in calls:
            with pytest.raises(LoRAError, match="refused inside"):
                call()
        assert inject(self.model, zoo_config(), merge_weights=self.by_mode) == ZOO_LAYERS  # nothing is new

    def weights_are_right(self, model: nn.Module, trained: Deltas) -> None:
        """Compare merged weights with sums in float64, and what is attached with what should be."""
        assert attached(model) == {name: weight for name, (weight, _) in sorted(self.beside.items())}
        state = merged_state_dict(model) if trained or self.beside else model.state_dict()
        for layer in ZOO_LAYERS:
            expected = self.base.state_dict()[f"{layer}.weight"].double() + trained.get(layer, 0)
            for weight, found in self.beside.values():
                expected = expected + weight * found[layer]
            torch.testing.assert_close(state[f"{layer}.weight"].double(), expected, rtol=1e-6, atol=1e-6)

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def the_base_is_intact_and_the_outputs_are_right(self) -> None:
        assert is_merged(self.model) == self.merged
        state, base = state_bits(self.model), state_bits(self.base)
        for layer in ZOO_LAYERS:
            assert state[f"{layer}.weight"] == base[f"{layer}.weight"]
        self.weights_are_right(self.model, deltas(self.model.state_dict()))
        plain = Zoo().eval()
        plain.load_state_dict(merged_state_dict(self.model))
        output = plain(tokens())
        torch.testing.assert_close(self.model(tokens()), output, rtol=1e-4, atol=1e-5)
        with merged(self.model):
            assert torch.equal(self.model(tokens()), output)
        with scaled(self.model, 0.0):
            self.weights_are_right(self.model, dict.fromkeys(ZOO_LAYERS, torch.zeros(())))
        with disable_adapter(self.model):
            assert torch.equal(self.model(tokens()), self.base(tokens()))
        assert state_bits(self.model) == state
        assert is_merged(self.model) == self.merged


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(max_examples=15, stateful_step_count=10)
