"""Replacing a folder or a file: in which order, beside other writers, and where it is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from lightning_lora import LoRAError
from lightning_lora.files.atomic import check_output_path, new_file, new_folder


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def write(target: Path, text: str) -> None:
    with new_folder(target, replaced=["part-*"]) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A result with something of the user's beside it."""
    path = tmp_path / "out"
    write(path, "old")
    (path / "mine" / "deep").mkdir(parents=True)
    (path / "mine" / "deep" / "notes").write_text("mine")
    (path / "part-1").write_text("old")
    return path


OLD = {"a": "old", "b": "old", "mine/deep/notes": "mine", "part-1": "old"}
NEW = {"a": "new", "b": "new", "mine/deep/notes": "mine"}


def test_folder_that_exists_gets_new_files_and_keeps_others(target: Path):
    number = target.stat().st_ino
    write(target, "new")
    assert contents(target) == NEW
    assert target.stat().st_ino == number
    assert os.listdir(target.parent) == ["out"]


def test_files_take_their_places_with_config_and_index_last_and_an_old_index_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At no moment an index names a file that is not there."""
    path, steps = tmp_path / "out", []
    path.mkdir()
    for old in ("part-9", "part.json", "mine"):
        (path / old).write_text("old")
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, "replace", lambda one, other: steps.append(other.name) or replace(one, other))
    monkeypatch.setattr(Path, "unlink", lambda file, **options: steps.append(file.name) or unlink(file, **options))
    with new_folder(path, replaced=["part*"]) as folder:
        for name in ("a.json", "part-1", "sub/part-2"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
    assert steps == ["part-1", "part-2", "a.json", "part.json", "part-9"]
    assert contents(path) == {"a.json": "new", "part-1": "new", "sub/part-2": "new", "mine": "old"}


def test_every_file_is_on_the_disk_before_the_first_takes_its_place(target: Path, monkeypatch: pytest.MonkeyPatch):
    """So that little time passes between the first and the last."""
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("sync") or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda one, other: steps.append("replace") or replace(one, other))
    write(target, "new")
    assert steps == ["sync", "sync", "replace", "replace"]


def test_folder_whose_second_file_cannot_be_moved_is_refused_by_name_and_holds_whole_files(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = os.replace

    def replace(file: Path, place: Path) -> None:
        if place.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        honest(file, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(LoRAError, match=r"out: the result is complete, but cannot be moved there: .*Permission denied"):
        write(target, "new")
    assert contents(target) == OLD | {"a": "new"}
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_writers_of_one_folder_at_once_all_succeed_and_leave_whole_files(tmp_path: Path, target: Path, there: bool):
    path = target if there else tmp_path / "new"
    writers, rounds = 4, 5
    start = Barrier(writers)

    def work(number: int) -> None:
        for _ in range(rounds):
            start.wait(5)
            write(path, str(number) * 9)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    found = contents(path)
    assert {found.pop("a"), found.pop("b")} <= {str(number) * 9 for number in range(writers)}
    assert found == ({"mine/deep/notes": "mine"} if there else {})
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", path.name}


def test_folder_that_another_writer_puts_there_meanwhile_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, honest = tmp_path / "out", os.rename

    def rename(folder: Path, place: Path) -> None:
        path.mkdir()
        (path / "theirs").write_text("theirs")
        honest(folder, place)

    monkeypatch.setattr(os, "rename", rename)
    write(path, "new")
    assert contents(path) == {"a": "new", "b": "new", "theirs": "theirs"}


def test_folder_that_is_a_mount_point_is_filled_from_inside(target: Path, monkeypatch: pytest.MonkeyPatch):
    """No file can be moved into it from outside."""
    monkeypatch.setattr(os.path, "ismount", lambda found: Path(found) == target)
    with new_folder(target) as folder:
        assert target in folder.parents
        (folder / "a").write_text("new")
    assert contents(target) == OLD | {"a": "new"}


WRITERS: dict[str, Callable[[Path], Any]] = {"file": new_file, "folder": new_folder}


@pytest.mark.parametrize("kind", WRITERS)
def test_result_whose_last_rename_fails_is_refused_by_name_and_leaves_the_old_one(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(source: Path, to: Path) -> None:
        raise OSError(errno.EBUSY, "Device busy")

    path = tmp_path / "out"
    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(LoRAError, match=rf"{path}: the result .*Device busy.*choose another"):  # noqa: SIM117
        with WRITERS[kind](path) as place:
            (place if kind == "file" else place / "a").write_text("new")
    assert os.listdir(tmp_path) == []


def test_output_path_that_cannot_be_written_is_refused_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def mkdir(path: Path, *_: int) -> None:
        assert tmp_path in (Path(path), Path(path).parent)
        raise PermissionError(errno.EACCES, "Permission denied")

    check_output_path(tmp_path / "a" / "b" / "out", folder=True)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(LoRAError, match=r"out: cannot be written: .*Permission denied"):
        check_output_path(tmp_path / "a" / "b" / "out", folder=True)
    assert os.listdir(tmp_path) == []
