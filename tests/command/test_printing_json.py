"""--json prints JSON for every reader, also where a value is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from support.peers import call


def adapted(alpha: float = 2.0, width: int = 4) -> nn.ModuleDict:
    """Another alpha is another adapter on the same base."""
    torch.manual_seed(1)
    net = nn.ModuleDict({"one": nn.Linear(width, width), "two": nn.Linear(width, width)})
    inject(net, LoRAConfig(r=2, lora_alpha=alpha, target_modules=["one"], modules_to_save=["two"]))
    with torch.no_grad():
        net["one"].lora_B.add_(torch.rand(width, 2))
        net["two"].weight.add_(1)
    return net


def strict(text: str) -> Any:
    """Read JSON as every other program does: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("size", [1e100, 1e160], ids=["square", "product"])
def test_info_of_factors_whose_norms_overflow_prints_null_for_them(tmp_path: Path, capsys: Any, size: float):
    shapes = {"one.lora_A": (2, 4), "one.lora_B": (4, 2)}
    factors = {name: torch.full(shape, size, dtype=torch.float64) for name, shape in shapes.items()}
    torch.save(factors, tmp_path / "a.pt")
    found = strict(call(capsys, "info", tmp_path / "a.pt", "--json"))
    expected = pytest.approx(8 * size * size) if size == 1e100 else None
    assert found["layers"]["one"]["rank"] == 2
    assert found["layers"]["one"]["norm_delta"] in (expected, None)
    assert found["norm"] in (expected, None)
    assert "1 adapted layers" in call(capsys, "info", tmp_path / "a.pt")


DIFFERING = {"first zero": (0.0, 1.0), "NaN": (float("nan"), 1.0), "Inf": (1.0, float("inf"))}


@pytest.mark.parametrize("case", DIFFERING)
def test_diff_of_weights_prints_null_for_what_is_no_number(tmp_path: Path, capsys: Any, case: str):
    for name, value in zip(("a", "b"), DIFFERING[case], strict=True):
        save_file({"one.weight": torch.full((2, 2), value)}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    row = strict(call(capsys, "diff", *files, "--json"))["changes"]["one.weight"]
    assert row["relative"] is None
    assert (row["change"] is None) == (case != "first zero")
    assert "1 of 1 differ" in call(capsys, "diff", *files)


def test_diff_of_adapters_prints_null_for_a_change_from_nothing(tmp_path: Path, capsys: Any):
    net = adapted()
    save_adapter(net, tmp_path / "b")
    with torch.no_grad():
        net["one"].lora_B.zero_()
    save_adapter(net, tmp_path / "a")
    row = strict(call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))["changes"]["one"]
    assert row["relative"] is None
    assert row["change"] > 0
