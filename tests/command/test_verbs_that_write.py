"""Verbs of the command: what they refuse to replace, what they say when stopped, and that JSON is JSON."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command.main import main
from lightning_lora.files import atomic
from lightning_lora.files.weights import Weights, open_weights
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

    for target in ("convert.adapter_with_options", "merge.adapter_with_options", "main.extract", "main.open_weights"):
        monkeypatch.setattr(f"lightning_lora.command.{target}", read)


@every_verb
def test_existing_output_is_refused_before_any_work_and_replaced_with_overwrite(
    inputs: Path, capsys: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs)
    verb = args[0]
    call(capsys, *args)
    first = contents(output)
    with monkeypatch.context() as patch:
        no_work(patch)
        expected = f"lightning-lora {verb}: {output} exists; choose another output, or pass --overwrite to replace it."
        assert refused(capsys, *args) == f"{expected}\n"
    assert contents(output) == first
    if output.is_dir():
        (output / "stale").write_text("x")
    call(capsys, *args, "--overwrite")
    again = contents(output)
    assert again.pop("stale", b"x") == b"x"
    assert again == first


OVERLAPPING = {  # an input, something inside one, and what holds one
    "merge to a folder": ["base", "base/in", "adapter", "."],
    "merge to a file": ["base.pt", "adapter/in.pt"],
    "export": ["adapter.ckpt", "."],
    "import": ["adapter/in.ckpt"],
    "extract": ["tuned.safetensors", "base.safetensors", "."],
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

    def mkdtemp(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", mkdtemp)
    assert f"{output}: cannot be written there" in refused(capsys, *args)


# --- Ctrl-C ---


@pytest.fixture
def _ctrl_c_works() -> Iterator[None]:
    """A job in the background starts without it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_ctrl_c_works")
@every_verb
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["before the rename", "after it"])
def test_ctrl_c_says_whether_the_output_was_written(
    inputs: Path, capsys: Any, name: str, moment: str, there: bool, monkeypatch: pytest.MonkeyPatch
):
    args, output = command(name, inputs)
    if there:
        call(capsys, *args)
        args.append("--overwrite")
    before = contents(output) if there else {}

    def press(honest: Callable[..., Any]) -> Callable[..., Any]:
        def put(*paths: Any) -> Any:
            done = honest(*paths) if moment == "after it" else None
            os.kill(os.getpid(), signal.SIGINT)
            return done

        return put

    monkeypatch.setattr(os, "replace", press(os.replace))
    monkeypatch.setattr(atomic, "_put_in_place", press(atomic._put_in_place))
    assert main(args) == 130
    shown = capsys.readouterr()
    assert shown.out == ""
    outcome = f"{output} was written and is complete" if moment == "after it" else "nothing was written"
    assert shown.err == f"lightning-lora {args[0]}: interrupted; {outcome}\n"
    if moment == "before the rename":
        assert (contents(output) if output.exists() else {}) == before
    assert {entry.name for entry in inputs.parent.iterdir()} <= {"inputs", output.name}


# --- JSON ---


def strict(text: str) -> Any:
    def no_json(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(text, parse_constant=no_json)


def test_diff_json_of_what_was_zero_and_of_nan_holds_null(tmp_path: Path, capsys: Any):
    """What was 0 changed by an infinite ratio; weights may hold NaN."""
    first = {"zero": torch.zeros(3), "nan": torch.ones(3), "same": torch.ones(3)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(first | {"zero": torch.ones(3), "nan": torch.tensor([1, 2, float("nan")])}, tmp_path / "b.safetensors")
    given = ["diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    rows = strict(call(capsys, *given, "--json"))["changes"]
    assert rows["zero"] == {"change": pytest.approx(3**0.5), "relative": None, "largest": 1.0}
    assert (rows["nan"]["change"], rows["nan"]["relative"]) == (None, None)
    assert rows["same"] == {"change": 0.0, "relative": 0.0, "largest": 0.0}
    assert "inf" in call(capsys, *given)


def test_info_json_of_factors_beyond_float64_holds_null(tmp_path: Path, capsys: Any):
    net = nn.Sequential(nn.Linear(2, 2).double())
    inject(net, LoRAConfig(r=1, init_lora_weights=False))
    save_adapter(net, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, 1e200) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    shown = strict(call(capsys, "info", tmp_path / "adapter", "--json"))
    assert shown["norm"] is None
    assert shown["layers"]["0"]["norm_delta"] is None
    assert shown["layers"]["0"]["rank"] == 1


def test_merge_opens_its_base_once(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    opened: list[Path] = []

    def open_and_count(path: Path) -> Weights:
        opened.append(Path(path))
        return open_weights(path)

    for module in ("merge", "main"):
        monkeypatch.setattr(f"lightning_lora.command.{module}.open_weights", open_and_count)
    args, _ = command("merge to a folder", inputs)
    call(capsys, *args)
    assert opened == [inputs / "base"]
