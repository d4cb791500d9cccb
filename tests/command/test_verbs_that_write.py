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
from support.peers import call, refused


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
    assert main(["import", str(path / "adapter"), str(path / "adapter.ckpt")]) == 0
    return path


VERBS: dict[str, tuple[str, list[str]]] = {
    "merge to a folder": ("out", ["merge", "--base", "IN/base", "--adapter", "IN/adapter", "--output", "OUT"]),
    "merge to a file": ("out.pt", ["merge", "--base", "IN/base.pt", "--adapter", "IN/adapter", "--output", "OUT"]),
    "export": ("out", ["export", "IN/adapter.ckpt", "OUT"]),
    "import": ("out.ckpt", ["import", "IN/adapter", "OUT"]),
    "extract": ("out", ["extract", "--base", "IN/base.safetensors", "--tuned", "IN/tuned.safetensors", "--rank=1",
                        "--output", "OUT"]),
    "plot": ("out.png", ["plot", "IN/adapter", "--output", "OUT"]),
}  # fmt: skip
FOLDERS = [name for name, (output, _) in VERBS.items() if output == "out"]
every_verb = pytest.mark.parametrize("name", VERBS)


def command(name: str, inputs: Path, *flags: str) -> tuple[list[str], Path]:
    output = inputs.parent / VERBS[name][0]
    return [arg.replace("IN", str(inputs)).replace("OUT", str(output)) for arg in VERBS[name][1]] + [*flags], output


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read for a result that is refused, beyond what tells its form."""

    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the work began")

    for target in (
        "command.convert.adapter_with_options",
        "command.convert.export_adapter",
        "command.merge.adapter_with_options",
        "command.main.extract",
        "command.main.open_weights",
        "command.main.plot_adapter",
    ):
        monkeypatch.setattr(f"lightning_lora.{target}", read)


OVERLAPPING = {  # an input, something inside one, and what holds one
    "merge to a folder": ["base", "base/in", "adapter", "."],
    "merge to a file": ["base.pt", "adapter/in.pt"],
    "export": ["adapter.ckpt", "."],
    "import": ["adapter/in.ckpt"],
    "extract": ["tuned.safetensors", "base.safetensors", "."],
    "plot": ["adapter/in.png", "."],
}


@every_verb
def test_output_that_is_or_holds_an_input_or_lies_in_it_is_refused(inputs: Path, capsys: Any, name: str):
    before = contents(inputs)
    for path in OVERLAPPING[name]:
        args, output = command(name, inputs, "--overwrite")
        args[args.index(str(output))] = str(inputs / path)
        assert "write somewhere else" in refused(capsys, *args)
    assert contents(inputs) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_existing_folder_that_is_no_earlier_result_is_not_replaced(inputs: Path, capsys: Any, name: str):
    args, output = command(name, inputs, "--overwrite")
    output.mkdir()
    (output / "a.jpg").write_text("mine")
    assert "is no earlier result, and is not replaced" in refused(capsys, *args)
    assert contents(output) == {"a.jpg": b"mine"}
    (output / "a.jpg").unlink()
    call(capsys, *args[:-1])  # an empty folder is as good as none


@every_verb
def test_output_in_a_home_folder_that_no_shell_put_in_is_refused(
    inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    """bash leaves the ~ of --output=~/out as it is. A folder named ~ would be made in the current folder."""
    monkeypatch.chdir(inputs.parent)
    arguments, output = command(name, inputs)
    given = [f"~/{output.name}" if argument == str(output) else argument for argument in arguments]
    assert f"~/{output.name} begins with '~'" in refused(capsys, *given)
    assert not Path("~").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_the_name_of_a_file_is_refused(inputs: Path, capsys: Any, name: str, suffix: str):
    arguments, output = command(name, inputs)
    given = [f"{output}{suffix}" if argument == str(output) else argument for argument in arguments]
    assert f"{output}{suffix} is to be a folder, and its name is that of a file" in refused(capsys, *given)
    assert not Path(f"{output}{suffix}").exists()


def test_merge_over_an_adapter_is_refused(inputs: Path, capsys: Any):
    """Its folder has safetensors too."""
    args, output = command("merge to a folder", inputs, "--overwrite")
    (inputs / "adapter").rename(output)
    before = contents(output)
    args[args.index("--adapter") + 1] = str(inputs / "adapter.ckpt")
    assert "is no earlier result, and is not replaced" in refused(capsys, *args)
    assert contents(output) == before


@pytest.mark.parametrize("content", ["checkpoint", "text"])
def test_import_over_what_is_no_adapter_is_refused(inputs: Path, capsys: Any, content: str):
    args, output = command("import", inputs, "--overwrite")
    if content == "text":
        output.write_text("mine")
    else:
        torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, output)
    before = contents(output)
    assert "holds no adapter, so it is no earlier result, and is not replaced" in refused(capsys, *args)
    assert contents(output) == before


@every_verb
def test_output_of_the_other_kind_is_refused_before_any_work(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs, "--overwrite")
    if name in FOLDERS:
        output.write_text("mine")
    else:
        output.mkdir()
    no_work(monkeypatch)
    kind, other = ("file", "folder") if name in FOLDERS else ("folder", "file")
    assert f"{output}: is a {kind}; give the name of a {other}." in refused(capsys, *args)


@every_verb
def test_output_where_nothing_can_be_written_is_refused_before_any_work(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs)
    no_work(monkeypatch)

    def mkdir(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert f"{output}: cannot be written:" in refused(capsys, *args)


@every_verb
def test_ctrl_c_before_an_earlier_result_is_replaced_says_that_nothing_was_written(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs)
    call(capsys, *args)
    before = contents(output)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", press)
    assert main([*args, "--overwrite"]) == 130
    assert capsys.readouterr().err == f"lightning-lora {args[0]}: interrupted; nothing was written\n"
    assert contents(output) == before
