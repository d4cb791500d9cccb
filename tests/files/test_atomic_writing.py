"""How results appear: aligned, on the disk before they are in place, and at no moment neither old nor new."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lightning_lora
from lightning_lora import LoRAConfig, LoRAError, inject, save_adapter, save_merged
from lightning_lora.command.main import main
from lightning_lora.formats.model_card import CARD_FILE

PACKAGE = str(Path(lightning_lora.__file__).parent)


class Mixed(nn.Module):
    """Tensors of every width, whose order by name would leave the wide ones at odd places."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a_byte", torch.ones(3, dtype=torch.uint8))
        self.b_half = nn.Linear(3, 3).bfloat16()
        self.c_single = nn.Linear(3, 3)
        self.register_buffer("d_double", torch.ones(3, dtype=torch.float64))


def adapted(scale: float = 1.0) -> Mixed:
    """Another scale is another adapter on the same base."""
    torch.manual_seed(1)
    net = Mixed()
    inject(net, LoRAConfig(r=1, target_modules=["b_half", "c_single"], init_lora_weights=False))
    with torch.no_grad():
        net.c_single.lora_B.mul_(scale)
    return net


def command(*args: object) -> None:
    """As a program does, with its status where it fails."""
    status = main([str(arg) for arg in args])
    if status:
        raise SystemExit(status)


Writer = Callable[[Path, Path, float], Path]  # from the inputs, to a folder, at some scale; returns where it wrote


def by_merge(form: str) -> Writer:
    def write(inputs: Path, target: Path, scale: float) -> Path:
        suffix = {"folder": "", "safetensors": ".safetensors", "torch": ".pt"}[form]
        given = ["--base", inputs / f"base{suffix}", "--adapter", inputs / f"adapter-{scale}"]
        command("merge", *given, "--output", target / f"out{suffix}", "--overwrite")
        return target / f"out{suffix}"

    return write


def by_export(inputs: Path, target: Path, scale: float) -> Path:
    command("export", inputs / f"adapter-{scale}", target / "out", "--overwrite")
    return target / "out"


def by_plot(inputs: Path, target: Path, scale: float) -> Path:
    command("plot", inputs / f"adapter-{scale}", "--output", target / "out.svg", "--overwrite")
    return target / "out.svg"


def by_save(save: Callable[..., None], **options: Any) -> Writer:
    def write(inputs: Path, target: Path, scale: float) -> Path:
        save(adapted(scale), target / "out", **options)
        return target / "out"

    return write


WRITERS: dict[str, Writer] = {
    "save_adapter": by_save(save_adapter),
    "save_merged in shards": by_save(save_merged, max_shard_bytes=60),
    "merge of a folder": by_merge("folder"),
    "merge of safetensors": by_merge("safetensors"),
    "merge of a state dict": by_merge("torch"),
    "export": by_export,
    "plot": by_plot,
}
MODELS = ["save_merged in shards", "merge of a folder", "merge of a state dict"]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The base in each form, and two adapters."""
    path = tmp_path / "inputs"
    (path / "base").mkdir(parents=True)
    state = {name: tensor for name, tensor in adapted().state_dict().items() if "lora_" not in name}
    save_file(state, path / "base.safetensors")
    save_file(state, path / "base" / "model.safetensors")
    (path / "base" / "config.json").write_text("{}")
    torch.save(state, path / "base.pt")
    for scale in (1.0, 2.0):
        save_adapter(adapted(scale), path / f"adapter-{scale}")
    (tmp_path / "results").mkdir()
    return path


def files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in files_in(path)}


@pytest.mark.parametrize("name", ["save_adapter", "save_merged in shards", "merge of a folder"])
def test_written_safetensors_start_at_eight_bytes_and_align_every_tensor(inputs: Path, name: str):
    out = WRITERS[name](inputs, inputs.parent / "results", 1.0)
    files = [file for file in files_in(out) if file.suffix == ".safetensors"]
    assert files
    dtypes = set()
    for file in files:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        assert start % 8 == 0
        with safe_open(file, "pt") as opened:
            widths = {key: opened.get_tensor(key).itemsize for key in header}
        dtypes |= set(widths.values())
        for key, entry in header.items():
            assert (start + entry["data_offsets"][0]) % widths[key] == 0, key
    assert len(dtypes) > 1


@pytest.mark.parametrize("name", ["save_adapter", *MODELS])
def test_every_written_file_is_on_the_disk_before_it_is_in_place(
    inputs: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    results = inputs.parent / "results"
    synced: dict[int, tuple[int, int]] = {}
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = (found.st_size, found.st_mtime_ns)
        in_place = [entry.name for entry in results.iterdir() if not entry.name.startswith(".")]
        assert in_place == []
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = WRITERS[name](inputs, results, 1.0)
    monkeypatch.undo()
    assert files_in(out)
    for file in files_in(out):
        found = file.stat()
        assert synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns), file.name


# --- permissions ---


def modes(path: Path) -> dict[str, int]:
    return {str(each.relative_to(path)): each.stat().st_mode & 0o7777 for each in (path, *path.rglob("*"))}


@pytest.fixture
def _umask() -> Iterator[None]:
    """Nothing for all others."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_umask")
@pytest.mark.parametrize("name", ["save_adapter", "merge of safetensors", "plot"])
def test_what_is_written_has_the_modes_of_the_umask_and_keeps_those_it_is_given(inputs: Path, name: str):
    results = inputs.parent / "results"
    out = WRITERS[name](inputs, results, 1.0)
    first = modes(out)
    assert set(first.values()) <= {0o640, 0o750}
    given = {path: 0o2770 if (out / path).is_dir() else 0o400 + 8 * number for number, path in enumerate(first)}
    for path, mode in given.items():
        (out / path).chmod(mode)
    before = {path: (out / path).stat().st_ino for path in first if (out / path).is_file() and path != CARD_FILE}
    WRITERS[name](inputs, results, 2.0)
    assert modes(out) == given
    assert not before.items() & {path: (out / path).stat().st_ino for path in before}.items()


@contextmanager
def at_every_line(look: Callable[[], object]) -> Iterator[None]:
    """Call `look` before each line of the package that runs inside."""

    def trace(frame: Any, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            look()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_file_of_a_replaced_result_is_at_every_moment_the_old_or_the_new_one(inputs: Path, name: str):
    results = inputs.parent / "results"
    out = WRITERS[name](inputs, results, 1.0)
    old = contents(out)
    seen: list[dict[str, bytes]] = []

    def look() -> None:
        found = contents(out)
        if not seen or seen[-1] != found:
            seen.append(found)

    with at_every_line(look):
        WRITERS[name](inputs, results, 2.0)
    new = contents(out)
    assert all(found[file] in (old[file], new[file]) for found in seen for file in (old if out.is_dir() else found))
    assert seen[0] == old != seen[-1] == new
    assert [entry.name for entry in results.iterdir()] == [out.name]


# --- Ctrl-C ---


@pytest.mark.parametrize(
    ("name", "moment"),
    [("merge of a folder", "first byte"), ("merge of a state dict", "first byte"), ("export", "last sync")],
)
def test_ctrl_c_while_a_verb_writes_exits_130_and_leaves_no_file(
    inputs: Path, name: str, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = inputs.parent / "results"
    pressed: list[str] = []

    def press(*_: object) -> None:
        if not pressed and any(file.stat().st_size for file in files_in(results)):
            pressed.append(moment)
            os.kill(os.getpid(), signal.SIGINT)

    if moment == "last sync":
        monkeypatch.setattr(os, "fsync", press)
    with (
        at_every_line(press if moment == "first byte" else lambda: None),
        pytest.raises((SystemExit, KeyboardInterrupt)) as stopped,
    ):
        WRITERS[name](inputs, results, 1.0)
    assert pressed
    assert (stopped.type, stopped.value.args) == (SystemExit, (130,))  # a Ctrl-C that got through would stop pytest
    printed = capsys.readouterr()
    assert printed.err.endswith(": interrupted.\n")
    assert printed.out == ""
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("moment", ["replace", "rmdir"])
@pytest.mark.parametrize("name", ["merge of a folder", "merge of a state dict"])
def test_ctrl_c_after_the_result_is_in_place_leaves_it(
    inputs: Path, name: str, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As soon as a file was moved to its place, or while what was used for that is removed."""
    results = inputs.parent / "results"
    out = WRITERS[name](inputs, results, 1.0)
    old, honest = contents(out), getattr(os, moment)

    def press(*args: Any, **options: Any) -> None:
        honest(*args, **options)
        if contents(out) != old:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, press)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        WRITERS[name](inputs, results, 2.0)
    assert (stopped.type, stopped.value.args) == (SystemExit, (130,))
    assert capsys.readouterr().err.endswith(": interrupted.\n")
    assert contents(out) != old


# --- earlier results ---


@pytest.mark.parametrize("name", ["save_adapter", "merge of a folder"])
def test_a_folder_that_is_written_again_holds_what_a_new_one_holds(inputs: Path, name: str):
    results = inputs.parent / "results"
    out = WRITERS[name](inputs, results, 1.0)
    old = contents(out)
    (results / "expected").mkdir()
    expected = contents(WRITERS[name](inputs, results / "expected", 2.0))
    WRITERS[name](inputs, results, 2.0)
    assert contents(out) == expected != old
    assert sorted(entry.name for entry in results.iterdir()) == ["expected", "out"]


def test_merge_over_a_result_of_more_files_leaves_none_of_them_and_keeps_the_rest(inputs: Path):
    """Readers would take the weights that the old index names, or find two models."""
    out = WRITERS["save_merged in shards"](inputs, inputs.parent / "results", 1.0)
    assert len(list(out.iterdir())) > 2
    (out / "mine.txt").write_text("mine")
    (out / "other.safetensors").write_bytes((inputs / "base.safetensors").read_bytes())
    WRITERS["merge of a folder"](inputs, inputs.parent / "results", 1.0)
    found = {file.name for file in out.iterdir()}
    assert found == {"config.json", "mine.txt", "model.safetensors", "other.safetensors"}


@pytest.mark.parametrize("name", ["save_adapter", "save_merged in shards"])
def test_a_result_whose_parent_cannot_be_written_is_refused_before_anything_is_written(
    inputs: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Told by what the system says, because some users may write everywhere."""
    results = inputs.parent / "results"
    synced: list[int] = []

    def mkdir(path: Any, *_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(LoRAError, match=str(results)):
        WRITERS[name](inputs, results, 1.0)
    assert synced == []
    assert list(results.iterdir()) == []
