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
from support.models import randomise_
from support.runs import lora_with_effect, trained
from support.training import Net, inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14"),
    pytest.mark.filterwarnings("ignore:.LightningModule.to_torchscript. has been deprecated"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level"),
]

X = torch.linspace(-1, 1, 12).view(3, 4)
MESSAGE = r"torch\.jit\.script: '{}' is an adapted Linear, .*merge_and_unload\(model\) first.*trace"


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
    with pytest.raises(LoRAError, match=MESSAGE.format(0)):
        torch.jit.script(net)
    expected = net(X)
    scripted = torch.jit.script(merge_and_unload(copy.deepcopy(net)))
    torch.testing.assert_close(scripted(X), expected)
    torch.testing.assert_close(net(X), expected)


def test_to_torchscript_after_a_fit_is_refused_with_the_remedy(tmp_path):
    net: Any = trained(tmp_path, Net(), lora_with_effect()).eval()
    with pytest.raises(LoRAError, match=MESSAGE.format(r"body\.0")):
        net.to_torchscript()
    expected = net(inputs())
    torch.testing.assert_close(net.to_torchscript(method="trace", example_inputs=inputs())(inputs()), expected)
    torch.testing.assert_close(merge_and_unload(net).to_torchscript()(inputs()), expected)


def exported(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.export(net, (X,)).module()


def traced_factored(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.trace(net, X)  # type: ignore[no-any-return]


def traced_from_a_copy(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.trace(merge_and_unload(copy.deepcopy(net)), X)  # type: ignore[no-any-return]


def traced_merged(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    with merged(net):
        return torch.jit.trace(net, X)  # type: ignore[no-any-return]


@pytest.mark.parametrize("trace", [exported, traced_factored, traced_from_a_copy])
def test_a_trace_or_export_of_the_factored_model_and_a_trace_of_a_merged_copy_keep_the_adapter(trace: Any):
    net = model()
    torch.testing.assert_close(trace(net)(X), net(X))


def test_a_trace_made_while_merged_shares_the_weights_and_is_the_base_after():
    """A trace holds the live parameters, and the graph of the base."""
    net = model()
    trace = traced_merged(net)
    assert not torch.allclose(trace(X), net(X))
    with merged(net):
        torch.testing.assert_close(trace(X), net(X))


SCRIPTED = r"inject: 'part\..*': TorchScript has compiled its forward, .*build it without torch.jit, or leave it out"


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


@pytest.mark.parametrize("part", [scripted_part, loaded_part])
@pytest.mark.parametrize("copied", [False, True])
def test_an_adapter_leaves_out_the_parameters_of_a_part_in_torchscript(
    part: Callable[[], torch.jit.ScriptModule], copied: bool
):
    inject(net := with_part(part()), LoRAConfig(r=2, target_modules=["body"]))
    held = adapter_state_dict(copy.deepcopy(net) if copied else net)  # a copy's parameters are plain tensors too
    buffers = [f"part.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert [*held] == ["body.lora_A", "body.lora_B", *buffers]


def test_rows_of_a_tied_table_are_trained_beside_a_part_in_torchscript():
    net = with_part(scripted_part())
    inject(net, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"table": [1]}))
    assert "head.lora_rows" in net.state_dict() or "table.lora_rows" in net.state_dict()


@pytest.mark.parametrize("options", [{"target_modules": ["part.0"]}, {"target_parameters": ["part.0.weight"]}])
def test_a_layer_in_torchscript_is_refused_with_the_remedy(options: Any):
    with pytest.raises(LoRAError, match=SCRIPTED):
        inject(with_part(scripted_part()), LoRAConfig(**{"target_modules": ["body"]} | options))
