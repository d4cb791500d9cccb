"""TorchScript of adapted layers: scripting is refused with the remedy, which works; a trace gives the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, merge, merge_and_unload, merged
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
