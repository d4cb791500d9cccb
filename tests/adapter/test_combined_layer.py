"""One layer of several adapters in one: pruned and voted on as PEFT does, and by hand."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils
from torch import nn

from lightning_lora import LoRAConfig, combine, inject
from lightning_lora.adapter.combined_layer import PRUNING, combined_change
from support.models.networks import checkpoint
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


@pytest.mark.parametrize("method", PRUNING)
def test_pruned_changes_are_combined_as_peft_combines_tensors(method: str):
    """With one random stream, since peft draws from the global one."""
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(7, 9, generator=generator) for _ in range(3)]
    weights = [0.7, -0.2, 1.1]
    torch.manual_seed(5)
    expected = getattr(merge_utils, method)(changes, torch.tensor(weights), 0.3)
    found = combined_change(changes, weights, method, 0.3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected)


def test_ties_by_hand():
    """Of the larger half of each: signs elected by the sums, then the mean of those that agree."""
    changes = [torch.tensor([[4.0, -3.0, 0.1, 0.2]]), torch.tensor([[-1.0, -5.0, 0.3, 2.0]])]
    found = combined_change(changes, [1.0, 1.0], "ties", 0.5, torch.Generator())
    assert found.tolist() == [[4.0, -4.0, 0.0, 2.0]]


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
def test_a_sign_without_a_majority_is_plus_as_in_peft():
    changes, weights = [torch.tensor([[2.0, 3.0]]), torch.tensor([[-2.0, 1.0]])], [1.0, 1.0]
    found = combined_change(changes, weights, "ties", 1.0, torch.Generator())
    assert found.tolist() == merge_utils.ties(changes, torch.tensor(weights), 1.0).tolist() == [[2.0, 2.0]]


def test_dare_draws_other_values_in_each_layer():
    net = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("one", "other")}).double()
    inject(net, LoRAConfig(r=6, target_modules=["one", "other"]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    state = combine([checkpoint(net, "adapter")], [1], method="dare_linear", density=0.5).tensors
    one, other = ((state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]).abs() > 1e-3 for name in ("one", "other"))
    assert 0 < one.sum() < 36
    assert not torch.equal(one, other)


def test_dare_keeps_the_expectation():
    change = torch.ones(200, 200)
    found = combined_change([change], [1.0], "dare_linear", 0.25, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean() == pytest.approx(1.0, abs=0.03)
