"""An Adapter as a value: what it shows of itself, and its copies."""

from __future__ import annotations

import copy
import pickle

import torch

from lightning_lora import load_adapter, read_adapter, take_adapter
from lightning_lora.adapter.adapter import Adapter
from support.models.networks import state_bits, two_layers
from support.runs.notices import TORCH_NOTICES

pytestmark = TORCH_NOTICES


def test_repr_says_what_an_adapter_is():
    assert repr(take_adapter(two_layers())) == "Adapter(r=2, 2 layers, 38 values)"
    shown = repr(take_adapter(two_layers(rank_pattern={"0": 3})))
    assert shown == "Adapter(r=2 to 3, 2 layers, 49 values)"
    bare = read_adapter({name: value for name, value in two_layers().state_dict().items() if "lora_" in name})
    assert repr(bare) == "Adapter(r=2, 2 layers, 38 values, without options)"
    assert repr(Adapter({"0.lora_A": torch.ones(2, 2)})) == "Adapter(1 layer, 4 values, without options)"


def test_an_adapter_is_copied_and_pickled():
    model, adapter = two_layers(3), take_adapter(two_layers())
    for again in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        load_adapter(model, again)
        assert state_bits(model) == state_bits(two_layers())
