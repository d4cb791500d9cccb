""" "all-linear" on a model with stacks of experts prints the option that adapts them, to copy, in one line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, summary
from support.peers import model as peers_model
from support.training import Net as Trained

OPTION = "target_parameters=['gate_up_proj', 'down_proj']"


class Experts(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * size, size))
        self.down_proj = nn.Parameter(torch.zeros(4, size, size))


class Mixture(Trained):
    """The small network of tests, with experts that nothing calls."""

    def __init__(self, size: int = 8, width: int = 8) -> None:
        super().__init__(width)
        self.experts = nn.ModuleList([Experts(size), Experts(size)])


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records for line in record.getMessage().splitlines() if "target_p" in line]


def test_it_is_one_line_after_inject_and_copied_it_adapts_them(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(model := Mixture(), LoRAConfig(r=1))
        assert summary(model).experts == OPTION
        (line,) = lines(caplog)
        assert line.endswith(f"; {OPTION} adapts the experts")
        caplog.clear()
        names = inject(model := Mixture(), eval(f"LoRAConfig(r=1, {OPTION})"))
    assert [name for name in names if "experts" in name] == [
        f"experts.{i}.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    ]
    assert not lines(caplog)
    assert summary(model).experts == ""


@pytest.mark.parametrize(
    ("options", "width"), [({}, 64), ({"target_modules": ["head"]}, 8)], ids=["a small share", "layers by name"]
)
def test_it_is_not_said_where_it_helps_nobody(options: dict[str, Any], width: int):
    inject(model := Mixture(2, width), LoRAConfig(r=1, **options))
    assert summary(model).experts == ""


@pytest.mark.transformers_5
def test_a_model_of_transformers():
    inject(model := peers_model("mixtral"), LoRAConfig(r=1))
    assert summary(model).experts == OPTION
