"""Tests on the pretended device leave nothing to the other tests of their process."""

from __future__ import annotations

import os

import torch
from torch import nn

from support.devices.pretend_device import DEVICE, pretend_device


def train_there() -> None:
    with pretend_device():
        layer = nn.Linear(3, 2).to(DEVICE)
        layer(torch.ones(1, 3).to(DEVICE)).sum().backward()
        assert torch.accelerator.is_available()


def backward() -> None:
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]


def test_outside_the_device_is_not_available_and_torch_is_as_it_was():
    generator, stream = torch.Generator, torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        train_there()
    assert not torch.accelerator.is_available()
    assert torch.Generator is generator
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.device("cpu") == torch.ones(1).device
    backward()


def test_forks_of_the_process_have_a_backward():
    """Which they have not where autograd has a thread for a device."""
    train_there()
    child = os.fork()
    if not child:
        try:
            backward()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
