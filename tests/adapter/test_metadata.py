"""The compact description of many layers, and tensors of one storage: they lose nothing."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter
from lightning_lora.adapter.adapter import Adapter, Layer
from lightning_lora.adapter.fingerprint import Entry, fingerprint_entries
from lightning_lora.adapter.metadata import decode_fingerprint as read_prints
from lightning_lora.adapter.metadata import decode_layers as read_layers
from lightning_lora.adapter.metadata import encode_fingerprint as shorten_prints
from lightning_lora.adapter.metadata import encode_layers as shorten_layers
from lightning_lora.exchange.take import copied
from support.models.networks import checkpoint

DTYPES = (torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_reads_back_unchanged(dtype: torch.dtype):
    odd = [math.nan, math.inf, -math.inf, -0.0] if dtype.is_floating_point else [0, 1, 1, 0]
    tensors = {
        "a.b.weight": torch.randn(3, 5).to(dtype),
        "c.bias": torch.tensor([*odd, 1.0, 0.5]).to(dtype),
        "top": torch.tensor(7.0).to(dtype),
        "d.weight": torch.zeros(0, 5, dtype=dtype),
    }
    prints = {**fingerprint_entries(tensors.items()), "e.weight": Entry("bfloat16", [3, 2], [], "nf4")}
    rows = shorten_prints(prints)
    assert rows["e.weight"] == ["bfloat16", [3, 2], [], "nf4"]
    assert rows["top"][1:] == [[], [float(tensors["top"])]]
    assert repr(read_prints(json.loads(json.dumps(rows)))) == repr(prints)  # NaN equals NaN


def test_shortened_layer_records_read_back_unchanged():
    layers = {
        "a": Layer(0, 2.0, "Linear"),
        "b": Layer(0, 0.1, "Linear", (True, False)),
        "c": Layer(0, 2.0, "Conv1D"),
        "d": Layer(0, 2.0),
    }
    short = shorten_layers(layers)
    assert short == [["Linear", 2.0, ["a"]], ["Linear", 0.1, ["b"]], ["Conv1D", 2.0, ["c"]], [None, 2.0, ["d"]]]
    assert read_layers(json.loads(json.dumps(short)), LoRAConfig(enable_lora={"b": [True, False]})) == layers


def saved(values: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return file


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14, of every one
def test_copied_tensors_share_one_storage_and_keep_their_values():
    weight = nn.Parameter(torch.randn(3, 4))
    values = {
        "weight": weight,
        "tied": weight.data,
        "part": weight.data[1:],
        "turned": weight.data.T,
        "half": torch.randn(5).half(),
        "none": torch.zeros(0, 3),
        "also none": torch.zeros(3, 0),
        "number": torch.tensor(3),
        "state": {"a": 1},
        "meta": torch.empty(2, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
    }
    found = copied(Adapter(values), on_cpu=True).tensors
    assert list(found) == list(values)
    assert found["state"] == values["state"]
    assert found["state"] is not values["state"]
    assert found["meta"].is_meta
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
    read = torch.load(saved(found), weights_only=True)
    for name in ("weight", "tied", "part", "turned", "half", "none", "also none", "number"):
        for tensor in (found[name], read[name]):
            assert tensor.dtype == values[name].dtype
            assert not tensor.requires_grad
            assert torch.equal(tensor, values[name])
    floats = [found[name] for name in ("weight", "tied", "part", "turned", "none", "also none")]
    assert len({tensor.untyped_storage()._cdata for tensor in floats}) == 1
    assert floats[0].untyped_storage().nbytes() == 4 * (12 + 8 + 12)
    assert floats[0] is floats[1]
    weight.data.zero_()
    assert found["weight"].any()


def test_tensors_of_one_storage_can_be_changed_saved_and_loaded_singly(tmp_path):
    """In a checkpoint they can be changed one by one, written as safetensors and loaded."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    inject(net, LoRAConfig(r=2, init_lora_weights=False))
    state = torch.load(saved(checkpoint(net, "adapter")), weights_only=True)
    before = {name: tensor.clone() for name, tensor in state["state_dict"].items()}
    state["state_dict"]["0.lora_B"].add_(1)
    for name, tensor in state["state_dict"].items():
        assert torch.equal(tensor, before[name]) == (name != "0.lora_B")
    save_file(state["state_dict"], tmp_path / "a.safetensors")
    load_adapter(net, state)
    assert torch.equal(net[0].lora_B, before["0.lora_B"] + 1)
