"""The pretended device itself, and the counter of what it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.covering import covering
from support.devices.places import Count, count
from support.devices.pretend_device import DEVICE, pretend_device


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with pretend_device():
        yield


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


MADE: dict[str, Callable[[], torch.Tensor]] = {
    "tensor": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "eye": lambda: torch.eye(3, device=DEVICE),
    "arange": lambda: torch.arange(4, device=DEVICE),
    "randn": lambda: torch.randn(3, device=DEVICE),
    "randperm": lambda: torch.randperm(4, device=DEVICE),
    "to": lambda: torch.ones(2).to(DEVICE),
    "type_as": lambda: torch.ones(2).type_as(there(1)),
    "new_zeros": lambda: there(2).new_zeros(3),
    "like": lambda: torch.zeros_like(there(2)),
    "a layer's weight": lambda: nn.Linear(2, 3, device=DEVICE).weight,
    "a moved layer's weight": lambda: nn.Linear(2, 3).to(DEVICE).weight,
    "index": lambda: there(3)[torch.tensor([0, 2])],
    "a generator of the device": lambda: torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE)),
}


def test_what_is_made_there_is_there():
    for name, make in MADE.items():
        made = make()
        assert made.device.type == DEVICE, name
        assert not made.is_cpu
        assert made.cpu().device.type == "cpu"
        assert type(made.cpu()) is torch.Tensor


REFUSED: dict[str, Callable[[], Any]] = {
    "add": lambda: there(3) + torch.ones(3),
    "cat": lambda: torch.cat([there(2), torch.ones(2)]),
    "mm": lambda: there(2, 2) @ torch.ones(2, 2),
    "equal": lambda: torch.equal(there(2), torch.ones(2)),
    "masked_fill": lambda: there(2).masked_fill(torch.tensor([True, False]), 0.0),
    "an index of the device": lambda: torch.ones(3)[torch.tensor([0], device=DEVICE)],
    "a generator of the CPU": lambda: there(3).normal_(generator=torch.Generator()),
    "a generator of the device on the CPU": lambda: torch.randn(3, generator=torch.Generator(DEVICE)),
    "numpy": lambda: there(3).numpy(),
    "a layer there, an input here": lambda: nn.Linear(2, 2, device=DEVICE)(torch.ones(1, 2)),
    "a loss over both": lambda: nn.functional.mse_loss(there(3), torch.ones(3)),
}


def test_what_a_gpu_refuses_is_refused_and_numbers_without_a_dimension_may_come_from_the_cpu():
    for work in REFUSED.values():
        with pytest.raises((RuntimeError, TypeError)):
            work()
    assert torch.equal((there(3) * torch.tensor(0.0)).cpu(), torch.zeros(3))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))


OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad)


@pytest.mark.parametrize(("make", "saving"), covering(OPTIMIZERS, [None, True, False], meet=1))  # by checkpointing
def test_training_there_is_training_here(make: Any, saving: bool | None):
    found = []
    for device in ("cpu", DEVICE):
        model = net().to(device)
        optimizer = make(model.parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(5, 4).to(device).requires_grad_()
            out = model(x) if saving is None else checkpoint(model, x, use_reentrant=saving)
            optimizer.zero_grad()
            out.square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert x.grad is not None
            assert x.grad.device.type == device
        found.append([parameter.detach().cpu() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# --- counting ---

COUNTED: dict[str, tuple[Callable[[torch.Tensor], object], Count]] = {  # of a square of 4 x 4 float32, 64 bytes
    "a sum of two": (lambda x: x + x, Count(1, 192, 0, 0)),
    "in place": (lambda x: x.add_(1), Count(1, 128, 0, 0)),
    "views": (lambda x: x.t_().t().view(2, 8)[0].unsqueeze(0).expand(3, 8).detach(), Count()),
    "an empty tensor": (lambda x: torch.empty_like(x), Count()),
    "a product": (lambda x: nn.functional.linear(x, x), Count(1, 192, 0, 0)),
    "a cast to float64": (lambda x: x.double(), Count(1, 192, 1, 0)),
    "a number in float64": (lambda x: x.sum(dtype=torch.float64), Count(1, 72, 0, 0)),
    "item": (lambda x: x[0, 0].item(), Count(1, 4, 0, 1)),
    "bool": (lambda x: bool(x[0, 0]), Count(1, 4, 0, 1)),
    "equal": (lambda x: torch.equal(x, x), Count(1, 128, 0, 1)),
    "nonzero": (lambda x: x.nonzero(), Count(1, 320, 0, 1)),
    "a copy to the CPU": (lambda x: x.cpu(), Count(1, 128, 0, 1)),
    "a copy into the CPU": (lambda x: torch.empty(4, 4).copy_(x), Count(1, 192, 0, 1)),
    "a copy from the CPU": (lambda x: torch.ones(4, 4).to(x.device), Count(1, 128, 0, 0)),
    "on the CPU": (lambda x: torch.ones(4, 4) + 1, Count()),
}


def test_each_operator_is_counted_of_the_backward_too_and_views_are_not():
    for name, (work, expected) in COUNTED.items():
        x = torch.ones(4, 4).to(DEVICE)
        found = count(lambda work=work, x=x: work(x))
        assert found == expected, name
        assert (found - found, sum(found.operators.values())) == (Count(), found.launches)
    assert count(lambda: None) == Count()
    layer, x = nn.Linear(4, 4).to(DEVICE), there(3, 4)
    forward = count(lambda: layer(x))
    assert count(lambda: layer(x).sum().backward()).launches > forward.launches + 2
