"""Owners and groups of replaced files, links as outputs, and folders that may not be written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRAError
from lightning_lora.files import atomic
from lightning_lora.files.atomic import check_output_path, new_file, new_folder


def write(path: Path, text: str, *, folder: bool) -> None:
    if not folder:
        with new_file(path) as file:
            file.write_text(text)
        return
    with new_folder(path, keep_others=True) as new:
        (new / "a").write_text(text)


def owned_by(monkeypatch: pytest.MonkeyPatch, uid: int, gid: int, mine: Callable[[Path], bool]) -> None:
    """Let what is not `mine` belong to another user and group, as far as os.stat tells."""
    honest = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        found = honest(path, **options)
        if isinstance(path, int) or mine(Path(path)):
            return found
        return os.stat_result((*found[:4], uid, gid, *found[6:]))

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("may", "asked", "mode"),
    [
        ("both", [(70001, 70002)], 0o664),
        ("group", [(70001, 70002), (-1, 70002)], 0o664),
        ("nothing", [(70001, 70002), (-1, 70002)], 0o644),  # all others might read, and so may another group
    ],
)
def test_owner_and_group_are_kept_as_far_as_the_system_allows(
    tmp_path: Path, folder: bool, may: str, asked: list[tuple[int, int]], mode: int, monkeypatch: pytest.MonkeyPatch
):
    path, seen = tmp_path / "out", []
    write(path, "old", folder=folder)
    file = path / "a" if folder else path
    file.chmod(0o664)

    def chown(new: Path, uid: int, gid: int) -> None:
        if Path(new).name == file.name:
            seen.append((uid, gid))
        if may == "nothing" or (may == "group" and uid != -1):
            raise PermissionError(1, "Operation not permitted")

    owned_by(monkeypatch, 70001, 70002, lambda found: ".partial" in str(found))
    monkeypatch.setattr(os, "chown", chown)
    write(path, "new", folder=folder)
    monkeypatch.undo()
    assert (file.read_text(), seen, file.stat().st_mode & 0o777) == ("new", asked, mode)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("exchange", [True, False])
def test_root_leaves_the_files_of_others_theirs(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    path = tmp_path / "out"
    write(path, "old", folder=True)
    (path / "theirs").mkdir()
    for each in (path, *path.iterdir()):
        os.chown(each, 70001, 70002)
    path.chmod(0o2750)
    (path / "theirs").chmod(0o750)  # whatever the umask is
    write(path, "new", folder=True)
    owners = {(each.stat().st_uid, each.stat().st_gid) for each in (path, *path.iterdir())}
    assert owners == {(70001, 70002)}
    assert (path.stat().st_mode & 0o7777, (path / "theirs").stat().st_mode & 0o7777) == (0o2750, 0o750)


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_stays_one_and_what_it_points_to_is_replaced_with_its_mode(tmp_path: Path, folder: bool):
    real, link = tmp_path / "far" / "real", tmp_path / "link"
    write(real, "old", folder=folder)
    real.chmod(0o750 if folder else 0o600)
    link.symlink_to(real)
    write(link, "new", folder=folder)
    assert link.readlink() == real
    assert (real / "a" if folder else real).read_text() == "new"
    assert real.stat().st_mode & 0o777 == (0o750 if folder else 0o600)
    assert sorted(os.listdir(tmp_path)) == ["far", "link"]
    assert os.listdir(real.parent) == ["real"]


def test_a_link_inside_a_replaced_folder_gives_the_mode_of_its_file_and_leaves_that_alone(tmp_path: Path):
    path, shared = tmp_path / "out", tmp_path / "shared"
    write(path, "old", folder=True)
    shared.write_text("of others too")
    shared.chmod(0o600)
    (path / "a").unlink()
    (path / "a").symlink_to(shared)
    write(path, "new", folder=True)
    assert not (path / "a").is_symlink()
    assert ((path / "a").read_text(), shared.read_text()) == ("new", "of others too")
    assert (path / "a").stat().st_mode & 0o777 == 0o600


def test_a_file_never_gets_another_users_rights(tmp_path: Path):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o4755)
    write(path, "new", folder=False)
    assert path.stat().st_mode & 0o7777 == 0o755


def test_a_file_that_is_read_only_is_replaced_and_stays_so(tmp_path: Path):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o444)
    write(path, "new", folder=False)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o444)


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Told by what the system says, because root may write everywhere."""
    path = tmp_path / "out"
    write(path, "old", folder=True)
    honest = os.access
    monkeypatch.setattr(os, "access", lambda found, mode: Path(found) != path and honest(found, mode))
    with pytest.raises(LoRAError, match="out: is a folder that you may not write to"), new_folder(path):
        pytest.fail("the work began")
    with pytest.raises(LoRAError, match="out: is a folder that you may not write to"):
        check_output_path(path, folder=True)
    assert (path / "a").read_text() == "old"


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "n" * 250])
@pytest.mark.parametrize("folder", [False, True])
def test_a_name_that_no_system_takes_is_refused_before_the_work(tmp_path: Path, name: str, folder: bool):
    with pytest.raises(LoRAError, match=r"cannot be (written|accessed)|leads nowhere"):
        check_output_path(tmp_path / name, folder=folder)
    with pytest.raises(LoRAError, match=r"cannot be (written|accessed)|leads nowhere"):
        write(tmp_path / name, "new", folder=folder)
    assert os.listdir(tmp_path) == []
