"""Trouble with a disk, a pipe, a path or a name ends a verb of the command in one line and an exit code."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command import main as command
from lightning_lora.command.main import VERBS, main
from lightning_lora.command.printing import json_text, one_line, printable
from support.models.peers import call

CASES = {  # where a result is written to, and by what
    "info": ("", "info IN/adapter"),
    "merge": ("out", "merge --base IN/base --adapter IN/adapter --output OUT"),
    "merge, one file": ("out.pt", "merge --base IN/base.pt --adapter IN/adapter --output OUT"),
    "export": ("out", "export IN/adapter OUT"),
    "plot": ("out.png", "plot IN/adapter --output OUT"),
}
# Paths that are read, as they are written above.
READ = {"merge": ["IN/base", "IN/adapter"], "merge, one file": ["IN/base.pt"], "export": ["IN/adapter"]}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs"
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    (path / "base").mkdir(parents=True)
    save_file(net.state_dict(), path / "base" / "model.safetensors")
    torch.save(net.state_dict(), path / "base.pt")
    inject(net, LoRAConfig(r=1, init_lora_weights=False))
    save_adapter(net, path / "adapter")
    return path


def arguments(inputs: Path, case: str, **replaced: str) -> list[str]:
    """The words of a case; replaced are paths as it has them, with _ for a slash."""
    output, words = CASES[case]
    paths = {name.replace("_", "/"): path for name, path in replaced.items()}
    places = {"IN": str(inputs), "OUT": str(inputs.parent / output)}
    args = [paths.get(word, word) for word in words.split()]
    return [places[arg] if arg in places else arg.replace("IN/", f"{inputs}/") for arg in args]


def failure(capsys: Any, args: list[str], status: int = 1) -> str:
    """The one line of a verb that failed, without what each begins with."""
    assert main(args) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    (line,) = printed.err[:-1].split("\n")
    assert line.isprintable()
    assert line.startswith(f"lightning-lora {args[0]}: ")
    return line.removeprefix(f"lightning-lora {args[0]}: ")


def left(inputs: Path) -> list[str]:
    return sorted(file.name for file in inputs.parent.iterdir())


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


class FullDisk(io.FileIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("case", [case for case, (output, _) in CASES.items() if output])
def test_full_disk_is_said_and_nothing_is_left(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    """Every way to write a file comes to one of these."""
    real_open = open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+") and "partial" in str(file):
            if "b" in mode:
                return FullDisk(file, mode.replace("b", ""))
            return io.TextIOWrapper(io.BufferedWriter(FullDisk(file, mode)), write_through=True)
        return real_open(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(io, "open", opened)  # pathlib's
    monkeypatch.setattr("shutil.copyfile", raising(OSError(errno.ENOSPC, "No space left on device")))
    args = arguments(inputs, case)
    output = args[args.index("--output") + 1] if "--output" in args else args[-1]
    assert failure(capsys, args) == f"{output}: No space left on device."
    assert left(inputs) == ["inputs"]


def test_error_of_the_system_is_said_in_one_line_and_a_defect_of_this_package_is_not_hidden(
    inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    def failing(error: BaseException) -> Callable[..., Any]:
        return functools.wraps(VERBS["info"])(raising(error))  # with its parameters and its help

    for error, status, said in (
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, "/a/b: Permission denied."),
        (KeyboardInterrupt(), 130, "interrupted."),
    ):
        monkeypatch.setitem(command.VERBS, "info", failing(error))
        assert failure(capsys, arguments(inputs, "info"), status) == said
    monkeypatch.setitem(command.VERBS, "info", failing(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(arguments(inputs, "info"))


class Output(io.TextIOWrapper):
    """A standard output that nothing can be written to."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number = number

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))  # a BrokenPipeError by its number

    def close(self) -> None:
        """Do not flush once more where it is collected, which Python 3.13 would tell of."""


def test_closed_pipe_ends_a_verb_quietly_and_a_full_disk_behind_it_is_an_error(
    inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    args = arguments(inputs, "export")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output(errno.EPIPE))
        assert main(args) == 141
    assert capsys.readouterr().err == ""
    assert left(inputs) == ["inputs", "out"]  # what it was to write is there
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output(errno.ENOSPC))
        assert main([*args, "--overwrite"]) == 1
    said = "its result cannot be printed: No space left on device."
    assert capsys.readouterr().err == f"lightning-lora export: {said}\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_pipe_closed_by_head_leaves_no_trace_of_python(inputs: Path):
    """Not at exit either, where Python writes what is left."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "lightning_lora", "info", "adapter", "--json"],
        cwd=inputs, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="other names are allowed")
@pytest.mark.parametrize("case", READ)
def test_unusable_path_is_refused(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(inputs.parent)
    long, odd = "a" * 300, "\x1b[31mred\nline\x07"
    for read in READ[case]:
        name = read.replace("/", "_")
        assert "cannot be accessed: File name too long." in failure(capsys, arguments(inputs, case, **{name: long}))
        said = failure(capsys, arguments(inputs, case, **{name: odd}))
        assert "\\x1b[31mred line\\x07: there is no such file" in said
    failure(capsys, arguments(inputs, case, OUT=long + Path(CASES[case][0]).suffix))
    real_stat = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(f"{inputs}{os.sep}locked"):  # the user may be root here, who may read all
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    locked = str(inputs / "locked" / "a.pt")
    said = failure(capsys, arguments(inputs, case, **{READ[case][0].replace("/", "_"): locked}))
    assert said == f"{locked}: cannot be accessed: Permission denied."
    assert left(inputs) == ["inputs"]


@pytest.mark.parametrize("path", [".", "link"])
def test_current_folder_is_filled_and_stays_the_same_folder(inputs: Path, monkeypatch: pytest.MonkeyPatch, path: str):
    """With another one in its place the shell would be in one that was deleted."""
    here = inputs.parent / "outer" / "here"
    here.mkdir(parents=True)
    (inputs.parent / "link").symlink_to(here)
    monkeypatch.chdir(here)
    path = str(inputs.parent / path) if path == "link" else path
    before = os.stat(here).st_ino
    assert main(arguments(inputs, "merge", OUT=path)) == 0
    assert os.stat(".").st_ino == os.stat(here).st_ino == before
    assert any(file.suffix == ".safetensors" for file in here.iterdir())
    assert left(inputs) == ["inputs", "link", "outer"]


HOSTILE = "\x1b[31mred\x07\nwrote all.\u202e\x7f\x9b"
SHOWN = "\\x1b[31mred\\x07\\nwrote all.\\u202e\\x7f\\x9b"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Weights, a fine-tune and an adapter of which a file says more than names."""
    state = {f"{HOSTILE}.weight": torch.ones(3, 2), "norm.weight": torch.ones(2)}
    save_file(state, tmp_path / "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "tuned.safetensors")
    factors = {f"{HOSTILE}.lora_A": torch.ones(1, 2), f"{HOSTILE}.lora_B": torch.ones(3, 1)}
    torch.save(factors, tmp_path / "bare.pt")
    return tmp_path


def test_control_characters_of_a_file_are_shown_and_json_holds_names_as_they_are(hostile: Path, capsys: Any):
    for words in (
        "info IN/bare.pt",
        "diff IN/base.safetensors IN/tuned.safetensors",
        "extract --base IN/base.safetensors --tuned IN/tuned.safetensors --rank 1 --output IN/extracted",
    ):
        lines = call(capsys, *words.replace("IN", str(hostile)).split()).split("\n")
        assert any(SHOWN in line for line in lines)
        assert all(line.isprintable() for line in lines)
        assert not any(line.startswith("wrote all") for line in lines)
    written = call(capsys, "info", hostile / "bare.pt", "--json")
    assert list(json.loads(written)["layers"]) == [HOSTILE]
    assert written.replace("\n", "").isprintable()
    assert written.isascii()


def test_lone_surrogate_in_a_file_is_shown_and_not_written(tmp_path: Path, capsys: Any):
    """No safetensors file can hold it: its readers want text."""
    file = tmp_path / "bare.pt"
    torch.save({"a\ud800.lora_A": torch.ones(1, 2), "a\ud800.lora_B": torch.ones(3, 1)}, file)
    assert "a\\ud800" in call(capsys, "info", file)
    said = failure(capsys, ["export", str(file), str(tmp_path / "out"), "--lora-alpha", "1"])
    assert "a\\ud800" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pt"]


def test_warning_is_one_readable_line(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    def text(_: Any) -> list[str]:
        return warnings.formatwarning("lightning_lora: \x1b[31m is\nodd.", UserWarning, "", 0).split("\n")

    monkeypatch.setitem(command.TEXTS, "info", text)
    assert call(capsys, *arguments(inputs, "info")) == "lightning_lora: \\x1b[31m is odd.\n\n"


def test_printable_text_is_as_repr_shows_it_and_a_line_has_no_breaks():
    for code in [*range(0x3000), 0xD800, 0xE000, 0xFEFF, 0x1F600, 0xE0001]:
        if chr(code) not in "'\\":
            assert printable(chr(code)) == repr(chr(code))[1:-1]
    assert one_line("a\nb\r\n\u2028c") == "a b\\r \\u2028c"


def strict(text: str) -> Any:
    """Read JSON as every other program does: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_null_for_what_is_no_finite_number(tmp_path: Path, capsys: Any):
    assert strict("".join(json_text({"a": [float("nan"), 1.0]}))) == {"a": [None, 1.0]}
    shapes = {"one.lora_A": (2, 4), "one.lora_B": (4, 2)}
    for name, size, norms in (("none", 0.0, [0.0]), ("square", 1e100, [8e200, None]), ("product", 1e160, [None])):
        factors = {key: torch.full(shape, size, dtype=torch.float64) for key, shape in shapes.items()}
        torch.save(factors, tmp_path / f"{name}.pt")
        found = strict(call(capsys, "info", tmp_path / f"{name}.pt", "--json"))
        assert found["layers"]["one"]["rank"] == 2
        for norm in (found["norm"], found["layers"]["one"]["norm_delta"]):
            assert any(norm == (pytest.approx(each) if each else each) for each in norms)
        assert "1 adapted layers" in call(capsys, "info", tmp_path / f"{name}.pt")
    row = strict(call(capsys, "diff", tmp_path / "none.pt", tmp_path / "square.pt", "--json"))["changes"]["one"]
    assert row["relative"] is None
    assert row["change"] is None or row["change"] > 0
    for case, (first, second) in {"zero": (0.0, 1.0), "NaN": (float("nan"), 1.0), "Inf": (1.0, float("inf"))}.items():
        for name, value in (("a", first), ("b", second)):
            save_file({"one.weight": torch.full((2, 2), value)}, tmp_path / f"{name}.safetensors")
        files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        row = strict(call(capsys, "diff", *files, "--json"))["changes"]["one.weight"]
        assert row["relative"] is None
        assert (row["change"] is None) == (case != "zero")
        assert "1 of 1 differ" in call(capsys, "diff", *files)
