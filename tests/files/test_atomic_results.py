"""Results moved into place: beside other writers, over others, where that is refused, and Ctrl-C afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, save_adapter, save_merged
from lightning_lora.command.main import main
from support.peers import call, refused


def adapted(alpha: float = 2.0, width: int = 4) -> nn.ModuleDict:
    """Another alpha is another adapter on the same base."""
    torch.manual_seed(1)
    net = nn.ModuleDict({"one": nn.Linear(width, width), "two": nn.Linear(width, width)})
    inject(net, LoRAConfig(r=2, lora_alpha=alpha, target_modules=["one"], modules_to_save=["two"]))
    with torch.no_grad():
        net["one"].lora_B.add_(torch.rand(width, 2))
        net["two"].weight.add_(1)
    return net


def base_state(width: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    net = nn.ModuleDict({"one": nn.Linear(width, width), "two": nn.Linear(width, width)})
    return dict(net.state_dict())


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The base in each form, two adapters, and a merged model as a full fine-tune."""
    path = tmp_path / "inputs"
    (path / "base").mkdir(parents=True)
    save_file(base_state(), path / "base" / "model.safetensors")
    save_file(base_state(), path / "base.safetensors")
    torch.save(base_state(), path / "base.pt")
    save_adapter(adapted(), path / "adapter")
    save_adapter(adapted(3.0), path / "another")
    save_merged(adapted(), path / "tuned")
    (tmp_path / "results").mkdir()
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# --- several writers ---


def run_in_threads(works: list[Callable[[], object]]) -> list[BaseException]:
    """What they raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_ranks_that_all_save_the_adapter_to_one_folder_at_once_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As under plain DDP, where each process calls save_adapter; they meet before each step."""
    target = tmp_path / "adapter"
    save_adapter(adapted(), target)
    nets = [adapted(3.0) for _ in range(4)]
    save_adapter(nets[0], tmp_path / "expected")
    honest, together = os.replace, threading.Barrier(len(nets))

    def replace(source: Any, place: Any, **options: Any) -> None:
        with suppress(threading.BrokenBarrierError):  # from then on they run freely
            together.wait(timeout=0.1)
        honest(source, place, **options)

    monkeypatch.setattr(os, "replace", replace)
    assert run_in_threads([lambda net=net: save_adapter(net, target) for net in nets]) == []
    assert contents(target) == contents(tmp_path / "expected")
    assert names(tmp_path) == ["adapter", "expected"]


# --- places that cannot be written to ---


def command(*args: object) -> None:
    """What the command says is raised."""
    if main([str(arg) for arg in args]):
        raise LoRAError("see the standard error")


WRITE: dict[str, Callable[..., None]] = {
    "save_adapter": lambda inputs, out, *flags: save_adapter(adapted(3.0), out),
    "save_merged": lambda inputs, out, *flags: save_merged(adapted(3.0), out),
    "export": lambda inputs, out, *flags: command("export", inputs / "another", out, *flags),
    "extract": lambda inputs, out, *flags: command(
        "extract", "--base", inputs / "base", "--tuned", inputs / "tuned", "--rank", 2, "--output", out, *flags
    ),
    "merge": lambda inputs, out, *flags: command(
        "merge", "--base", inputs / "base", "--adapter", inputs / "another", "--output", out, *flags
    ),
}


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each weight that is decomposed, and each written file that is brought to the disk."""
    calls: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **options)

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(torch.linalg, "svd", noting(torch.linalg.svd))
    return calls


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, refuses: Callable[[Path], bool]) -> None:
    """Let a function of os fail for some paths, whichever of its arguments they are."""
    honest = getattr(os, name)

    def fail(*args: Any, **options: Any) -> Any:
        for arg in args:
            if isinstance(arg, (str, os.PathLike)) and refuses(Path(arg)):
                raise OSError(code, os.strerror(code), str(arg))
        return honest(*args, **options)

    monkeypatch.setattr(os, name, fail)


def test_extract_into_a_parent_that_cannot_be_written_is_refused_before_the_work(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worked: list[str]
):
    parent = inputs.parent / "results"
    honest = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **o: honest(path, mode, **o) and not (Path(path) == parent and mode & os.W_OK)
    )
    for function in ("mkdir", "rename", "replace"):
        refusing(monkeypatch, function, errno.EACCES, lambda path: path.parent == parent)
    with pytest.raises(LoRAError):
        WRITE["extract"](inputs, parent / "out")
    assert str(parent) in capsys.readouterr().err
    assert worked == []
    assert names(parent) == []


# --- overwriting ---


TARGETS = {"export": "out", "extract": "out"}


def verb(name: str, inputs: Path, source: Path, out: Path) -> list[object]:
    if name == "extract":
        base = inputs / "base" / "model.safetensors"
        return ["extract", "--base", base, "--tuned", source, "--rank", 2, "--output", out]
    return [name, source, out]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_exists_is_refused_before_any_work_unless_overwrite_is_given(
    inputs: Path, capsys: Any, name: str
):
    results = inputs.parent / "results"
    out = results / TARGETS[name]
    first, other = (
        (inputs / "tuned", inputs / "tuned") if name == "extract" else (inputs / "adapter", inputs / "another")
    )
    call(capsys, *verb(name, inputs, first, out))
    before = contents(out)
    missing = inputs / "missing.safetensors"
    for source in (other, missing):  # that it is not even there is not found out
        shown = refused(capsys, *verb(name, inputs, source, out))
        assert str(out) in shown
        assert "--overwrite" in shown
        assert contents(out) == before
        assert names(results) == [out.name]
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    call(capsys, *verb(name, inputs, other, out))
    expected = load_file(out / "adapter_model.safetensors") if out.is_dir() else torch.load(out, weights_only=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    call(capsys, *verb(name, inputs, first, out))
    call(capsys, *verb(name, inputs, other, out), "--overwrite")
    found = load_file(out / "adapter_model.safetensors") if out.is_dir() else torch.load(out, weights_only=True)
    assert str(found) == str(expected)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_of_the_other_sort_is_refused_also_with_overwrite(inputs: Path, capsys: Any, name: str):
    """A file where a folder is to be, or a folder where a file is to be, is no earlier result."""
    out = inputs.parent / "results" / TARGETS[name]
    if out.suffix:
        out.mkdir()
    else:
        out.write_text("mine")
    source = inputs / ("tuned" if name == "extract" else "adapter")
    shown = refused(capsys, *verb(name, inputs, source, out), "--overwrite")
    assert str(out) in shown
    assert out.is_dir() if out.suffix else out.read_text() == "mine"


def test_merge_over_a_result_of_more_files_leaves_none_of_them_and_keeps_the_rest(inputs: Path, capsys: Any):
    """Readers would take the weights that the old index names, or find two models."""
    out = inputs.parent / "results" / "out"
    save_merged(adapted(3.0), out, max_shard_bytes=40)
    assert len(names(out)) > 2
    (out / "mine.txt").write_text("mine")
    (out / "other.safetensors").write_bytes((inputs / "base.safetensors").read_bytes())
    call(capsys, "merge", "--base", inputs / "base", "--adapter", inputs / "adapter", "--output", out, "--overwrite")
    assert names(out) == ["mine.txt", "model.safetensors", "other.safetensors"]


# --- Ctrl-C when the result is in place ---


def press_after(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Press it once, as soon as a result was moved to its place, or while what was used for that is removed."""
    moved: list[str] = []
    pressed: list[str] = []

    def moving(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            moved.append(function.__name__)
            if moment == "moved":
                press()
            return result

        return call

    def press() -> None:
        if moved and not pressed:
            pressed.append(moment)
            raise KeyboardInterrupt

    honest = os.rmdir

    def rmdir(*args: Any, **options: Any) -> None:
        honest(*args, **options)
        press()

    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    monkeypatch.setattr(os, "rmdir", rmdir)


MERGED = {"folder": "", "folder again": "", "safetensors": ".safetensors", "torch": ".pt"}


@pytest.mark.parametrize("moment", ["moved", "cleaning up"])
@pytest.mark.parametrize("name", [*MERGED, *TARGETS])
def test_ctrl_c_after_the_result_is_in_place_leaves_it(
    inputs: Path, name: str, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = inputs.parent / "results"
    if name in MERGED:
        out = results / f"out{MERGED[name]}"
        given = ["merge", "--base", inputs / f"base{MERGED[name]}", "--output", out, "--overwrite", "--adapter"]
        args: list[object] = [*given, inputs / "adapter"]
    else:
        out = results / TARGETS[name]
        args = verb(name, inputs, inputs / ("tuned" if name == "extract" else "adapter"), out)
    if name == "folder again":
        call(capsys, *given, inputs / "another")
    press_after(monkeypatch, moment)
    try:
        status = main([str(arg) for arg in args])
    except KeyboardInterrupt:
        status = None  # else pytest would stop
    assert status == 130
    assert capsys.readouterr().err.endswith(": interrupted.\n")
    assert contents(out)
