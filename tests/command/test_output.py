"""Verbs of the command that write: what they refuse to replace, and where they refuse to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command.main import main
from support.models.networks import checkpoint
from support.models.peers import call, refused


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A base in two forms, a full fine-tune, and an adapter in two forms; results go beside them."""
    path = tmp_path / "inputs"
    (path / "base").mkdir(parents=True)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, path / "base" / "model.safetensors")
    torch.save(state, path / "base.pt")
    save_file({name: tensor + torch.randn_like(tensor) for name, tensor in state.items()}, path / "tuned.safetensors")
    save_file(state, path / "base.safetensors")
    inject(net, LoRAConfig(r=1, init_lora_weights=False))
    save_adapter(net, path / "adapter")
    torch.save(checkpoint(net, "adapter"), path / "adapter.ckpt")
    return path


VERBS: dict[str, tuple[str, list[str]]] = {
    "merge to a folder": ("out", ["merge", "--base", "IN/base", "--adapter", "IN/adapter", "--output", "OUT"]),
    "merge to a file": ("out.pt", ["merge", "--base", "IN/base.pt", "--adapter", "IN/adapter", "--output", "OUT"]),
    "export": ("out", ["export", "IN/adapter.ckpt", "OUT"]),
    "extract": ("out", ["extract", "--base", "IN/base.safetensors", "--tuned", "IN/tuned.safetensors", "--rank=1",
                        "--output", "OUT"]),
    "combine": ("out", ["combine", "IN/adapter", "IN/adapter.ckpt", "--weights", "1", "1", "--output", "OUT"]),
    "plot": ("out.png", ["plot", "IN/adapter", "--output", "OUT"]),
}  # fmt: skip
FOLDERS = [name for name, (output, _) in VERBS.items() if output == "out"]


def command(name: str, inputs: Path, *flags: str) -> tuple[list[str], Path]:
    output = inputs.parent / VERBS[name][0]
    return [arg.replace("IN", str(inputs)).replace("OUT", str(output)) for arg in VERBS[name][1]] + [*flags], output


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


OVERLAPPING = {  # an input, something inside one, and what holds one
    "merge to a folder": ["base", "base/in", "adapter", "."],
    "merge to a file": ["base.pt", "adapter/in.pt"],
    "export": ["adapter.ckpt", "."],
    "extract": ["tuned.safetensors", "base.safetensors", "."],
    "combine": ["adapter", "adapter.ckpt"],
    "plot": ["adapter/in.png", "."],
}


@pytest.mark.parametrize("name", VERBS)
def test_output_over_an_input_of_the_other_kind_or_where_nothing_can_be_written_is_refused_before_any_work(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is read for a result that is refused, beyond what tells its form."""
    for target in (
        "command.main.export_adapter",
        "command.merge.adapter_with_options",
        "command.main.extract_from_weights",
        "command.main.open_weights",
        "command.main.combine_adapters",
        "command.main.plot_adapter",
    ):
        monkeypatch.setattr(f"lightning_lora.{target}", lambda *_, **__: pytest.fail("the work began"))
    args, output = command(name, inputs, "--overwrite")
    before = contents(inputs)
    for path in OVERLAPPING[name]:
        over = [str(inputs / path) if arg == str(output) else arg for arg in args]
        assert "write somewhere else" in refused(capsys, *over)
    assert contents(inputs) == before
    if name in FOLDERS:
        output.write_text("mine")
    else:
        output.mkdir()
    kind, other = ("file", "folder") if name in FOLDERS else ("folder", "file")
    assert f"{output}: is a {kind}; give the name of a {other}." in refused(capsys, *args)
    output.unlink() if name in FOLDERS else output.rmdir()

    def mkdir(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert f"{output}: cannot be written:" in refused(capsys, *args)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_else_lies_in_a_folder_stays_where_a_result_is_written_over_it(inputs: Path, capsys: Any, name: str):
    args, output = command(name, inputs, "--overwrite")
    output.mkdir()
    call(capsys, *args[:-1])  # an empty folder is as good as none
    (output / "a.jpg").write_text("mine")
    before = contents(output)
    assert "pass --overwrite to replace it" in refused(capsys, *args[:-1])
    assert contents(output) == before
    call(capsys, *args)
    assert contents(output)["a.jpg"] == b"mine"


def test_merge_over_an_adapter_is_refused(inputs: Path, capsys: Any):
    """from_pretrained would add it to the merged weights."""
    args, output = command("merge to a folder", inputs, "--overwrite")
    (inputs / "adapter").rename(output)
    before = contents(output)
    args[args.index("--adapter") + 1] = str(inputs / "adapter.ckpt")
    assert "holds adapter_config.json" in refused(capsys, *args)
    assert contents(output) == before


@pytest.mark.parametrize("name", ["merge to a folder", "merge to a file"])
def test_ctrl_c_before_an_earlier_result_is_replaced_leaves_it(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs)
    call(capsys, *args)
    before = contents(output)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", press)
    assert main([*args, "--overwrite"]) == 130
    assert capsys.readouterr().err == f"lightning-lora {args[0]}: interrupted.\n"
    assert contents(output) == before
