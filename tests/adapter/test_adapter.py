"""An Adapter as a value: what it shows of itself, and its copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, read_adapter, take_adapter
from lightning_lora.adapter.adapter import Adapter
from support.models.networks import state_bits
from support.runs.notices import TORCH_NOTICES

pytestmark = TORCH_NOTICES


def net(seed: int = 2, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inject(model, LoRAConfig(**{"r": 2, "init_lora_weights": False} | options), seed=seed)
    return model


def test_repr_says_what_an_adapter_is():
    assert repr(take_adapter(net())) == "Adapter(r=2, 2 layers, 38 values)"
    shown = repr(take_adapter(net(rank_pattern={"0": 3})))
    assert shown == "Adapter(r=2 to 3, 2 layers, 49 values)"
    bare = read_adapter({name: value for name, value in net().state_dict().items() if "lora_" in name})
    assert repr(bare) == "Adapter(r=2, 2 layers, 38 values, without options)"
    assert repr(Adapter({"0.lora_A": torch.ones(2, 2)})) == "Adapter(1 layer, 4 values, without options)"


def test_an_adapter_is_copied_and_pickled():
    model, adapter = net(3), take_adapter(net())
    for again in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        load_adapter(model, again)
        assert state_bits(model) == state_bits(net())
