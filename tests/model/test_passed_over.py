""" "all-linear" says what it passes over: kinds of weights, their shares, and the option that adapts experts."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, summary
from support.models.peers import model as peers_model
from support.runs.training import Data, make_trainer, own_random_stream
from support.runs.training import Net as Trained


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
    return [record.getMessage() for record in caplog.records if "does not adapt" in record.getMessage()]


def test_all_linear_says_what_it_passes_over_and_its_largest_kinds(caplog):
    (line,) = logged(caplog)
    total = 1100
    assert line == (
        f"lightning_lora: 'all-linear' does not adapt {875 / total:.1%} of the parameters"
        "; 'all-layers' adapts more "
        f"(Linear {200 / total:.1%}, Experts.down_proj {100 / total:.1%}, Conv2d {100 / total:.1%}, ...)"
    )


def test_what_is_excluded_or_saved_whole_is_not_passed_over():
    options = {"exclude_modules": ["conv"], "modules_to_save": ["foreign", "experts", "lstm", "more"]}
    inject(model := Net(), LoRAConfig(r=1, **options))
    found = f"{175 / 1100:.1%} of the parameters; 'all-layers' adapts more (Embedding {100 / 1100:.1%}, "
    assert summary(model).passed_over.startswith(found)
    inject(model := Net(), LoRAConfig(r=1, **options | {"exclude_modules": ["conv", "embed"]}))
    assert summary(model).passed_over == ""  # attention is 75 of 1100


@pytest.mark.parametrize(("rows", "is_said"), [(2, False), (3, True)])
def test_what_is_passed_over_is_said_above_a_tenth(tmp_path, caplog, rows: int, is_said: bool):
    with own_random_stream(1):
        model = Tabled(rows)
    share = 8 * rows / sum(parameter.numel() for parameter in model.parameters())
    assert (share > 0.1) == is_said
    with caplog.at_level(logging.INFO):
        inject(copy.deepcopy(model), LoRAConfig(r=1))
        assert caplog.text.count("does not adapt") == is_said
        caplog.clear()
        make_trainer(tmp_path, LoRACallback(r=1), max_epochs=1).fit(model, Data())
        assert caplog.text.count("does not adapt") == is_said
    assert (f"does not adapt {share:.1%} of the parameters (Embedding {share:.1%})" in str(summary(model))) == is_said


class Tabled(Trained):
    """171 parameters and a table of 8 columns."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 8)


def test_a_list_of_targets_passes_over_nothing_and_neither_does_a_model_of_linear_layers(caplog):
    assert not logged(caplog, target_modules=["adapted"])
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(nn.Sequential(nn.Linear(50, 50), nn.LayerNorm(2), nn.Bilinear(1, 1, 1)), LoRAConfig(r=1))
    assert "does not adapt" not in caplog.text


# --- stacks of experts ---

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
def test_the_option_for_experts_is_not_said_where_it_helps_nobody(options: dict[str, Any], width: int):
    inject(model := Mixture(2, width), LoRAConfig(r=1, **options))
    assert summary(model).experts == ""


@pytest.mark.transformers_5
def test_experts_of_a_transformers_model_are_told():
    inject(model := peers_model("mixtral"), LoRAConfig(r=1))
    assert summary(model).experts == OPTION
