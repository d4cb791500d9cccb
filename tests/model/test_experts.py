"""Stacks of experts that "all-linear" does not adapt, and the option that does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, summary
from support.models.peers import model as peers_model
from support.runs.training import Net as Trained

OPTION = "target_parameters=['gate_up_proj', 'down_proj']"


class Stack(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * size, size))
        self.down_proj = nn.Parameter(torch.zeros(4, size, size))


class Mixture(Trained):
    """The small network of tests, with experts that nothing calls."""

    def __init__(self, size: int = 8, width: int = 8) -> None:
        super().__init__(width)
        self.experts = nn.ModuleList([Stack(size), Stack(size)])


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records for line in record.getMessage().splitlines() if "target_p" in line]


def test_stacks_of_experts_are_told_with_the_option_that_adapts_them(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(model := Mixture(), LoRAConfig(r=1))
        assert summary(model).experts == OPTION
        (line,) = lines(caplog)
        assert line == f"lightning_lora: 'all-linear' does not adapt the experts; {OPTION} does"
        caplog.clear()
        names = inject(model := Mixture(), eval(f"LoRAConfig(r=1, {OPTION})"))
    assert [name for name in names if "experts" in name] == [
        f"experts.{i}.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    ]
    assert not lines(caplog)
    assert summary(model).experts == ""


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 64),
        ({"target_modules": ["head"]}, 8),
        ({"exclude_modules": r"head|experts\.\d"}, 8),
        ({"modules_to_save": ["experts"]}, 8),
    ],
    ids=["a small share", "layers by name", "excluded", "trained whole"],
)
def test_the_option_for_experts_is_not_said_where_it_helps_nobody(options: dict[str, Any], width: int):
    inject(model := Mixture(2 if width == 64 else 8, width), LoRAConfig(r=1, **options))
    assert summary(model).experts == ""


def test_a_weight_of_three_dimensions_of_a_class_of_torch_is_no_stack_of_experts():
    inject(model := nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 8)), LoRAConfig(r=1, target_modules="all-linear"))
    assert summary(model).experts == ""


@pytest.mark.transformers_5
def test_experts_of_a_transformers_model_are_told():
    inject(model := peers_model("mixtral"), LoRAConfig(r=1))
    assert summary(model).experts == OPTION
