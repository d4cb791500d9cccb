"""Verbs in any order: after each the base is intact, and outputs are those of a plain model built by hand."""

from __future__ import annotations

import copy
import pickle
import sys

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_lora import (
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
    unmerge,
)
from support.models.networks import ZOO_LAYERS, Zoo, bits, state_bits, tokens, train, zoo_config

MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function
BUDGET = MERGE.COPY_BUDGET


class Verbs(RuleBasedStateMachine):
    """`base` is a plain model with what unload has to bring back; `merged` says what is_merged has to say."""

    @initialize(by_mode=st.booleans(), seed=st.integers(0, 9), copies=st.booleans())
    def start(self, by_mode: bool, seed: int, copies: bool) -> None:
        torch.manual_seed(seed)
        MERGE.COPY_BUDGET = BUDGET if copies else 0
        self.model, self.by_mode, self.merged = Zoo().eval(), by_mode, False
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
        fresh.load_state_dict(state, strict=False) if by_torch else load_adapter(fresh, state)
        self.model, self.merged = fresh, False

    @rule()
    def inject_again(self) -> None:
        assert inject(self.model, zoo_config(), merge_weights=self.by_mode) == ZOO_LAYERS

    @rule()
    def unload(self) -> None:
        unload(self.model)
        assert state_bits(self.model) == state_bits(self.base)
        inject(self.model, zoo_config(), merge_weights=self.by_mode)
        self.merged = False

    @rule()
    def merge_and_unload(self) -> None:
        expected = {name: bits(tensor) for name, tensor in merged_state_dict(self.model).items()}
        self.base = merge_and_unload(self.model)
        assert state_bits(self.base) == expected
        self.model, self.merged = copy.deepcopy(self.base), False
        inject(self.model, zoo_config(), merge_weights=self.by_mode)

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def the_base_is_intact_and_the_outputs_are_right(self) -> None:
        assert is_merged(self.model) == self.merged
        state, base = state_bits(self.model), state_bits(self.base)
        for layer in ZOO_LAYERS:
            assert state[f"{layer}.weight"] == base[f"{layer}.weight"]
        plain = Zoo().eval()
        plain.load_state_dict(merged_state_dict(self.model))
        output = plain(tokens())
        torch.testing.assert_close(self.model(tokens()), output, rtol=1e-4, atol=1e-5)
        with merged(self.model):
            assert torch.equal(self.model(tokens()), output)
        with disable_adapter(self.model):
            assert torch.equal(self.model(tokens()), self.base(tokens()))
        assert state_bits(self.model) == state
        assert is_merged(self.model) == self.merged


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(max_examples=15, stateful_step_count=10)
