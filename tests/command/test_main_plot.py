"""`lightning-lora plot`: its text, its exit codes, and the file it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command import main as command
from support.peers import call, refused


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two adapters, their base, and a file that is no picture."""
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))})
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    inject(net, LoRAConfig(r=2, init_lora_weights=False))
    save_adapter(net, tmp_path / "a")
    with torch.no_grad():
        net.layers[0]["q"].lora_B.neg_()
    save_adapter(net, tmp_path / "b")
    (tmp_path / "metrics.csv").write_text("step\n0\n")
    return tmp_path


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_writes_a_picture_and_says_what_is_in_it(inputs: Path, capsys: Any, suffix: str):
    output = inputs / f"out{suffix}"
    assert call(capsys, "plot", inputs / "a", "--output", output) == f"wrote {output}: norms, spectra\n"
    assert output.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_the_command_calls_the_function_and_nothing_else(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    monkeypatch.setattr(command, "plot_adapter", lambda *args, **options: given.append((args, options)) or {"norms": 1})
    assert call(capsys, "plot", "a", "--output=o.png") == "wrote o.png: norms\n"
    assert given == [(("a",), {"output": "o.png"})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN/a", "--output", "IN/out.gif"], "the output 'out.gif' must end in one of .png, .pdf, .svg."),
        (["IN/none", "--output", "IN/out.png"], "none: there is no such file"),
        (["IN/base.safetensors", "--output", "IN/out.png"], "base.safetensors"),
        (["IN/a", "--output", "IN/a/out.png"], "write somewhere else"),
        (["IN/a", "--output", "IN/b"], "is a folder; give the name of a file"),
        (["IN/a", "--output", "IN/metrics.csv"], "exists; choose another output, or pass --overwrite to replace it"),
        (["IN/a", "--output", "IN/metrics.csv", "--overwrite"], "'metrics.csv' must end in one of .png, .pdf, .svg."),
    ],
)
def test_what_cannot_be_drawn_or_written_is_refused_in_one_line(
    inputs: Path, capsys: Any, arguments: list[str], message: str
):
    shown = refused(capsys, "plot", *(argument.replace("IN", str(inputs)) for argument in arguments))
    assert message.replace("IN", str(inputs)) in shown
    assert shown.startswith("lightning-lora plot: ")
    assert not shown.startswith("lightning-lora plot: plot")
    assert shown.count("\n") == 1
    assert not (inputs / "out.png").exists()


def test_plot_without_matplotlib_names_the_extra(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_lora.report.figures.find_spec", lambda name: None)
    shown = refused(capsys, "plot", inputs / "a", "--output", inputs / "out.png")
    assert "needs matplotlib; pip install matplotlib." in shown
