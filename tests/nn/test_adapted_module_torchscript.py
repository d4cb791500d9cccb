"""TorchScript of adapted layers: scripting is refused with the remedy, which works; a trace gives the same outputs.

A model may also have a part that TorchScript has compiled. It stays frozen, and everything else is adapted.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
)
from support.models.networks import randomise_

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level"),
]

X = torch.linspace(-1, 1, 12).view(3, 4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inject(net, LoRAConfig(r=2))
    randomise_(net)
    return net


@pytest.mark.parametrize("state", ["factored", "merged"])
def test_scripting_an_adapted_model_is_refused_with_the_remedy(state: str):
    net = model()
    if state == "merged":
        merge(net)
    with pytest.raises(LoRAError, match=r"'0' is an adapted Linear, .*merge_and_unload\(model\) first"):
        torch.jit.script(net)
    expected = net(X)
    scripted = torch.jit.script(merge_and_unload(copy.deepcopy(net)))
    torch.testing.assert_close(scripted(X), expected)
    torch.testing.assert_close(net(X), expected)


def test_a_trace_or_export_of_the_factored_model_and_a_trace_of_a_merged_copy_keep_the_adapter():
    net = model()
    without = merge_and_unload(copy.deepcopy(net))
    for found in (torch.export.export(net, (X,)).module(), torch.jit.trace(net, X), torch.jit.trace(without, X)):
        torch.testing.assert_close(found(X), net(X))


def with_part(part: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    table = nn.Embedding(12, 4)
    table.weight = (head := nn.Linear(4, 12)).weight
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), part=part, head=head, table=table))


def scripted_part() -> torch.jit.ScriptModule:
    torch.manual_seed(1)
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def loaded_part() -> torch.jit.ScriptModule:
    """As a file of TorchScript gives it: its parameters are plain tensors."""
    torch.jit.save(scripted_part(), buffer := io.BytesIO())
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("part", [scripted_part, loaded_part])
def test_model_with_a_part_in_torchscript_is_adapted_around_it(part: Callable[[], torch.jit.ScriptModule]):
    net = with_part(part())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert inject(net, LoRAConfig(r=2, target_modules="all-linear")) == ["body"]  # the head is tied to the table
    assert not any(parameter.requires_grad for parameter in net.part.parameters())
    randomise_(net)
    expected = net.body(X)
    with merged(net):
        torch.testing.assert_close(net.body(X), expected)
    state = net.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert before.keys() == merged_state_dict(net).keys()
    buffers = [f"part.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    for each in (net, copy.deepcopy(net)):  # a copy's parameters are plain tensors
        assert [*adapter_state_dict(each)] == ["body.lora_A", "body.lora_B", *buffers]
    tied = with_part(part())
    inject(tied, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"table": [1]}))
    assert {"head.lora_rows", "table.lora_rows"} & tied.state_dict().keys()


@pytest.mark.parametrize("options", [{"target_modules": ["part.0"]}, {"target_parameters": ["part.0.weight"]}])
def test_a_layer_in_torchscript_is_refused_with_the_remedy(options: Any):
    with pytest.raises(LoRAError, match=r"'part\..*': TorchScript has compiled its forward"):
        inject(with_part(scripted_part()), LoRAConfig(**{"target_modules": ["body"]} | options))
