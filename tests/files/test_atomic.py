"""Replacing a folder or a file: without an exchange of names, beside other writers, and where it is refused."""

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
from lightning_lora.files import atomic
from lightning_lora.files.atomic import check_output_path, new_file, new_folder


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def write(target: Path, text: str) -> None:
    with new_folder(target, keep_others=True, replaced=["part-*"]) as folder:
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


@pytest.fixture
def _no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS and Windows."""
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)


@pytest.mark.usefixtures("_no_exchange")
def test_folder_replaced_without_exchange_holds_new_files_and_others(target: Path):
    write(target, "new")
    assert contents(target) == NEW
    assert os.listdir(target.parent) == ["out"]


def test_file_that_is_copied_for_want_of_links_or_lies_deep_is_on_the_disk_before_it_is_in_place(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: set[int] = set()
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        honest(descriptor)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", no_links)
    write(target, "new")
    assert contents(target) == NEW
    assert [file.name for file in target.rglob("*") if file.is_file() and file.stat().st_ino not in synced] == []
    with new_folder(target) as folder:
        (folder / "deep" / "down").mkdir(parents=True)
        (folder / "deep" / "down" / "file").write_text("new")
    assert (target / "deep" / "down" / "file").stat().st_ino in synced


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fail(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


# What happens instead of the rename that puts the new folder in, or right after the one that moves the old one away.
FAULTS: dict[str, tuple[str, Callable[..., None], type[BaseException]]] = {
    "new one refused": ("in", fail, LoRAError),
    "Ctrl-C before the new one": ("in", interrupt, KeyboardInterrupt),
    "Ctrl-C after the old one": ("away", interrupt, KeyboardInterrupt),
}


@pytest.mark.usefixtures("_no_exchange")
@pytest.mark.parametrize("fault", FAULTS)
def test_folder_that_cannot_be_put_in_leaves_the_old_one_under_its_name(
    target: Path, fault: str, monkeypatch: pytest.MonkeyPatch
):
    where, act, error = FAULTS[fault]
    honest = os.rename

    def rename(source: Path, to: Path) -> None:
        gone = not target.exists()
        if where == "in" and gone and source.parent.suffix == ".partial":
            act()
        honest(source, to)
        if where == "away" and source == target:
            act()

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(error, match=str(target) if error is LoRAError else None):
        write(target, "new")
    assert contents(target) == OLD
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.usefixtures("_no_exchange")
def test_folder_that_cannot_be_moved_back_is_kept_and_named(target: Path, monkeypatch: pytest.MonkeyPatch):
    honest = os.rename

    def rename(source: Path, to: Path) -> None:
        if not target.exists():
            raise OSError(errno.EIO, "Input/output error", str(source), None, str(to))
        honest(source, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(LoRAError) as caught:
        write(target, "new")
    (kept,) = target.parent.iterdir()
    assert contents(kept) == OLD
    assert str(kept) in str(caught.value)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_writers_of_one_folder_at_once_leave_the_whole_result_of_one(
    tmp_path: Path, target: Path, there: bool, exchange: bool, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    path = target if there else tmp_path / "new"
    writers, rounds = 4, 15
    start = Barrier(writers)

    def work(number: int) -> None:
        for _ in range(rounds):
            start.wait(5)
            write(path, str(number))

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    found = contents(path)
    assert found.pop("a") == found.pop("b")
    assert found == ({"mine/deep/notes": "mine"} if there else {})
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", path.name}


@pytest.mark.usefixtures("_no_exchange")
@pytest.mark.parametrize("moment", ["away before us", "back before us", "grown"])
def test_folder_that_another_writer_changes_meanwhile_is_replaced_after_it(
    target: Path, moment: str, monkeypatch: pytest.MonkeyPatch
):
    """It has just moved the old folder away, or puts its own there while ours is not in yet, or adds a file."""
    honest = os.rename
    acted: list[str] = []

    def rename(source: Path, to: Path) -> None:
        if source != target or acted:
            honest(source, to)
            return
        acted.append(moment)
        if moment == "away before us":
            honest(target, target.with_name("theirs"))
        elif moment == "grown":
            (target / "late").write_text("late")
        honest(source, to)
        if moment == "back before us":
            write(target, "theirs")

    monkeypatch.setattr(os, "rename", rename)
    write(target, "new")
    assert acted
    assert contents(target) == (NEW | {"late": "late"} if moment == "grown" else NEW)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), PermissionError(errno.EACCES, "x"), None])
def test_folder_that_another_writer_replaces_while_it_is_read_is_read_again(
    target: Path, error: OSError | None, exchange: bool, monkeypatch: pytest.MonkeyPatch
):
    """Its files are deleted then: reading them fails, or sees fewer of them."""
    honest, acted = atomic._link, []

    def link(*paths: Any) -> None:
        if acted:
            honest(*paths)
            return
        acted.append(error)
        write(target, "theirs")
        if error:
            raise error

    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(atomic, "_link", link)
    write(target, "new")
    assert acted
    assert contents(target) == NEW


def test_folder_that_another_writer_moves_away_before_it_is_read_is_not_missed(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    def identity(path: Path) -> None:
        if path.exists():
            path.rename(path.with_name("theirs"))

    monkeypatch.setattr(atomic, "identity", identity)
    write(target, "new")
    assert contents(target) == {"a": "new", "b": "new"}
    assert contents(target.with_name("theirs")) == OLD


def test_folder_whose_others_cannot_be_read_stays(target: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "_link", fail)
    with pytest.raises(LoRAError, match=r"out: the result is complete, but cannot be moved there: .*Permission denied"):
        write(target, "new")
    assert contents(target) == OLD
    assert os.listdir(target.parent) == ["out"]


WRITERS: dict[str, Callable[[Path], Any]] = {"file": new_file, "folder": new_folder}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
def test_result_whose_last_rename_fails_is_refused_by_name_and_leaves_the_old_one(
    tmp_path: Path, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
):
    def fail(source: Path, to: Path) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "out"
    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(LoRAError, match=rf"{path}: the result .*{os.strerror(number)}.*choose another"):  # noqa: SIM117
        with WRITERS[kind](path) as place:
            (place if kind == "file" else place / "a").write_text("new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_output_that_is_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "out"
    monkeypatch.setattr(os.path, "ismount", lambda found: Path(found) == path)
    with pytest.raises(LoRAError, match="is a mount point"), WRITERS[kind](path):
        pytest.fail("the work began")
    with pytest.raises(LoRAError, match="is a mount point"):
        check_output_path(path, folder=kind == "folder")


def test_output_path_that_cannot_be_written_is_refused_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def mkdir(path: Path, *_: int) -> None:
        assert tmp_path in (Path(path), Path(path).parent)
        raise PermissionError(errno.EACCES, "Permission denied")

    check_output_path(tmp_path / "a" / "b" / "out", folder=True)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(LoRAError, match=r"out: cannot be written: .*Permission denied"):
        check_output_path(tmp_path / "a" / "b" / "out", folder=True)
    assert os.listdir(tmp_path) == []
