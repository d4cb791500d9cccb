"""What "all-linear" passes over is logged once: kinds of weights, and their shares of the parameters."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject


class Linear(nn.Module):
    """As torch_geometric's, which is not torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 5, 5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted = nn.Linear(10, 10, bias=False)  # 100 parameters
        self.foreign = nn.ModuleList([Linear(10, 10), Linear(10, 10)])  # 200
        self.experts = Experts()  # 100
        self.conv = nn.Conv2d(5, 5, 2, bias=False)  # 100
        self.embed = nn.Embedding(10, 10)  # 100
        self.lstm = nn.LSTM(5, 5, bias=False)  # 200
        self.attention = nn.MultiheadAttention(5, 1, bias=False)  # 75 and out_proj, which is adapted, 25
        self.more = nn.Bilinear(5, 5, 4, bias=False)  # 100
        self.norm = nn.LayerNorm(50)  # 100


def logged(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(Net(), LoRAConfig(r=1, **options))
    return [record.getMessage() for record in caplog.records if "passes over" in record.getMessage()]


def test_all_linear_says_once_what_it_passes_over_and_its_share(caplog):
    (line,) = logged(caplog)
    total = 1100
    assert line == (
        f"lightning_lora: 'all-linear' passes over {875 / total:.1%} of the parameters: "
        f"2 {Linear.__module__}.Linear {200 / total:.1%}, 1 LSTM {200 / total:.1%}, "
        f"1 Experts.down_proj {100 / total:.1%}, 1 Conv2d {100 / total:.1%}, 1 Embedding {100 / total:.1%}, "
        f"1 Bilinear {100 / total:.1%}, others {75 / total:.1%}; "
        "target_parameters=['down_proj', 'weight_ih_l0', 'weight_hh_l0'] adapts what is no layer"
    )


def test_what_is_excluded_or_saved_whole_is_not_passed_over(caplog):
    (line,) = logged(caplog, exclude_modules=["conv"], modules_to_save=["foreign", "experts", "embed", "lstm", "more"])
    assert line == (
        f"lightning_lora: 'all-linear' passes over {75 / 1100:.1%} of the parameters: "
        f"1 MultiheadAttention.in_proj {75 / 1100:.1%}"
    )


def test_a_list_of_targets_passes_over_nothing_and_neither_does_a_model_of_linear_layers(caplog):
    assert not logged(caplog, target_modules=["adapted"])
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(nn.Sequential(nn.Linear(50, 50), nn.LayerNorm(2), nn.Bilinear(1, 1, 1)), LoRAConfig(r=1))
    assert "passes over" not in caplog.text
