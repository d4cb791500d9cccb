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
from lightning_lora.command.printing import one_line, printable
from support.peers import call

WRITING = {  # where each result is written to, and by what
    "merge": ("out", "merge --base IN/base --adapter IN/adapter --output OUT"),
    "merge, one file": ("out.pt", "merge --base IN/base.pt --adapter IN/adapter --output OUT"),
    "export": ("out", "export IN/adapter OUT"),
    "extract": ("out", "extract --base IN/base --tuned IN/tuned --rank 1 --output OUT"),
    "plot": ("out.png", "plot IN/adapter --output OUT"),
    "combine": ("out", "combine IN/adapter IN/adapter --weights 1 1 --output OUT"),
}
READING = {"info": ("", "info IN/adapter"), "diff": ("", "diff IN/adapter IN/adapter")}
CASES = WRITING | READING
FOLDERS = [case for case, (output, _) in WRITING.items() if output == "out"]
# By verb: the paths that are read, as they are written above.
READ = {
    "merge": ["IN/base", "IN/adapter"],
    "merge, one file": ["IN/base.pt", "IN/adapter"],
    "extract": ["IN/base", "IN/tuned"],
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs"
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, step in {"base": 0, "tuned": 1}.items():
        (path / name).mkdir(parents=True)
        save_file({key: tensor + step for key, tensor in state.items()}, path / name / "model.safetensors")
    torch.save(state, path / "base.pt")
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


def test_the_table_has_every_verb():
    assert {case.partition(",")[0] for case in CASES} == set(VERBS)


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


def replaced(verb: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """What runs in place of a verb, with its parameters and its help."""
    return functools.wraps(VERBS[verb])(run)


class FullDisk(io.FileIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("case", WRITING)
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            1,
            "/a/b: Permission denied.",
        ),
        (KeyboardInterrupt(), 130, "interrupted."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_of_the_system_is_said_in_one_line(
    inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str, error: BaseException, status: int, said: str
):
    verb = case.partition(",")[0]
    monkeypatch.setitem(command.VERBS, verb, replaced(verb, raising(error)))
    assert failure(capsys, arguments(inputs, case), status).startswith(said)


def test_defect_of_this_package_is_no_error_of_the_system(inputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(command.VERBS, "info", replaced("info", raising(RuntimeError("a defect"))))
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


@pytest.mark.parametrize("case", CASES)
def test_closed_pipe_ends_a_verb_quietly(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    args = arguments(inputs, case)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output(errno.EPIPE))
        assert main(args) == 141
    assert capsys.readouterr().err == ""
    assert left(inputs) == sorted(["inputs", *filter(None, [CASES[case][0]])])  # what it was to write is there


@pytest.mark.parametrize("case", CASES)
def test_output_onto_a_full_disk_is_an_error(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    args = arguments(inputs, case)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output(errno.ENOSPC))
        assert main(args) == 1
    said = "its result cannot be printed: No space left on device."
    assert capsys.readouterr().err == f"lightning-lora {args[0]}: {said}\n"


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


def paths_read(case: str) -> list[str]:
    return READ.get(case, ["IN/adapter"])


UNUSABLE = {
    "of 300 characters": ("a" * 300, "cannot be accessed: File name too long."),
    "with escape codes": ("\x1b[31mred\nline\x07", "\\x1b[31mred line\\x07: there is no such file"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="other names are allowed")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_path_of_an_input_is_refused(inputs: Path, capsys: Any, case: str, kind: str):
    path, said = UNUSABLE[kind]
    for read in paths_read(case):
        assert said in failure(capsys, arguments(inputs, case, **{read.replace("/", "_"): path}))
        assert left(inputs) == ["inputs"]


@pytest.mark.skipif(sys.platform == "win32", reason="other names are allowed")
@pytest.mark.parametrize("case", WRITING)
@pytest.mark.parametrize("kind", ["of 300 characters"])
def test_unusable_path_of_an_output_is_refused(
    inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str, kind: str
):
    monkeypatch.chdir(inputs.parent)
    name = UNUSABLE[kind][0]
    path = name + Path(WRITING[case][0]).suffix if name else name
    failure(capsys, arguments(inputs, case, OUT=path))
    assert left(inputs) == ["inputs"]


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("path", [".", "link"])
def test_current_folder_is_filled_and_stays_the_same_folder(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, case: str, path: str
):
    """With another one in its place the shell would be in one that was deleted."""
    here = inputs.parent / "outer" / "here"
    here.mkdir(parents=True)
    (inputs.parent / "link").symlink_to(here)
    monkeypatch.chdir(here)
    path = str(inputs.parent / path) if path == "link" else path
    before = os.stat(here).st_ino
    assert main([str(each) for each in arguments(inputs, case, OUT=path)]) == 0
    assert os.stat(".").st_ino == os.stat(here).st_ino == before
    assert any(file.suffix == ".safetensors" for file in here.iterdir())
    assert left(inputs) == ["inputs", "link", "outer"]


def test_save_adapter_fills_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Linear(2, 2))
    inject(net, LoRAConfig(r=1))
    before = os.stat(".").st_ino
    for path in (".", "", tmp_path, tmp_path / ".." / tmp_path.name):
        save_adapter(net, path)
        assert os.stat(tmp_path).st_ino == before
        assert "adapter_config.json" in os.listdir()


@pytest.mark.parametrize("case", CASES)
def test_folder_that_may_not_be_entered_is_said(inputs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    """Its content cannot be read. The user may be root here, who may read all."""
    real_stat = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(f"{inputs}{os.sep}locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    for read in paths_read(case):
        locked = str(inputs / "locked" / Path(read).name)
        said = failure(capsys, arguments(inputs, case, **{read.replace("/", "_"): locked}))
        assert said == f"{locked}: cannot be accessed: Permission denied."
    if case in WRITING:
        locked = str(inputs / "locked" / WRITING[case][0])
        assert "Permission denied" in failure(capsys, arguments(inputs, case, OUT=locked))
    assert left(inputs) == ["inputs"]


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


HOSTILE_COMMANDS = [
    "info IN/bare.pt",
    "info IN/made",
    "diff IN/base.safetensors IN/tuned.safetensors",
    "extract --base IN/base.safetensors --tuned IN/tuned.safetensors --rank 1 --output IN/extracted",
    "combine IN/made IN/made --weights 1 1 --output IN/combined",
]


@pytest.mark.parametrize("words", HOSTILE_COMMANDS)
def test_control_characters_of_a_file_are_shown(hostile: Path, capsys: Any, words: str):
    call(capsys, "export", hostile / "bare.pt", hostile / "made", "--lora-alpha", 1)
    lines = call(capsys, *words.replace("IN", str(hostile)).split()).split("\n")
    assert any(SHOWN in line for line in lines)
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("wrote all") for line in lines)


def test_json_holds_names_as_they_are_and_only_ascii(hostile: Path, capsys: Any):
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


def test_line_has_no_breaks():
    assert one_line("a\nb\r\n\u2028c") == "a b\\r \\u2028c"


def test_printable_text_is_as_repr_shows_it():
    for code in [*range(0x3000), 0xD800, 0xE000, 0xFEFF, 0x1F600, 0xE0001]:
        if chr(code) not in "'\\":
            assert printable(chr(code)) == repr(chr(code))[1:-1]
