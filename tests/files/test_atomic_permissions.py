"""Modes of replaced files, links as outputs, and folders that may not be written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_lora import LoRAError
from lightning_lora.files.atomic import check_output_path, new_file, new_folder


def write(path: Path, text: str, *, folder: bool) -> None:
    if not folder:
        with new_file(path) as file:
            file.write_text(text)
        return
    with new_folder(path) as new:
        (new / "a").write_text(text)


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


@pytest.mark.parametrize(("before", "after"), [(0o4755, 0o755), (0o444, 0o444)])
def test_a_file_keeps_its_mode_without_another_users_rights_also_if_it_is_read_only(
    tmp_path: Path, before: int, after: int
):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(before)
    write(path, "new", folder=False)
    assert (path.read_text(), path.stat().st_mode & 0o7777) == ("new", after)


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


@pytest.mark.parametrize(("name", "folder"), [("n" * 300, False), ("n" * 250, True)])
def test_a_name_that_no_system_takes_is_refused_before_the_work(tmp_path: Path, name: str, folder: bool):
    with pytest.raises(LoRAError, match=r"cannot be (written|accessed)|leads nowhere"):
        check_output_path(tmp_path / name, folder=folder)
    with pytest.raises(LoRAError, match=r"cannot be (written|accessed)|leads nowhere"):
        write(tmp_path / name, "new", folder=folder)
    assert os.listdir(tmp_path) == []
