"""Hidden folders of interrupted writers go at once; those of killed writers are removed by the next writer."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_lora.files import atomic, leftovers
from lightning_lora.files.atomic import check_output_path, new_file, new_folder
from lightning_lora.files.leftovers import UNKNOWN_AGE, UNLOCKED_AGE, hold, release
from support.broken_off import break_off

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from lightning_lora.files.atomic import new_file
with new_file(sys.argv[1]) as file:
    print(file.parent, flush=True)
    sys.stdin.read()
"""


def write(path: Path, text: str = "new") -> None:
    with new_folder(path, keep_others=True) as folder:
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(text)


def write_file(path: Path, text: str = "new") -> None:
    with new_file(path) as file:
        file.write_text(text)


def contents(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_text() for file in files}


def leave(target: Path, age: float, token: str = "0123abcd", *, locked: bool = True) -> Path:
    """Make what a killed writer leaves."""
    folder = target.with_name(f".{target.name}.{token}.partial")
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "half").write_text("half")
    if locked:
        release(hold(folder))
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - age,) * 2)
    return folder


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("age", [UNLOCKED_AGE, UNKNOWN_AGE])
@pytest.mark.parametrize("kind", [write, write_file])
def test_what_a_killed_writer_left_is_removed_when_it_is_old(
    tmp_path: Path, kind: Callable[[Path], None], age: int, locked: bool
):
    young = leave(tmp_path / "out", age - 100, "456789ab", locked=locked)
    old = leave(tmp_path / "out", age + 100, locked=locked)
    kind(tmp_path / "out")
    assert old.exists() == (not locked and age == UNLOCKED_AGE)
    assert young.exists() == (not locked or age == UNLOCKED_AGE)
    assert contents(tmp_path / "out")


def test_the_last_change_inside_counts(tmp_path: Path):
    left = leave(tmp_path / "out", 2 * UNKNOWN_AGE)
    os.utime(left / "out" / "half")
    write(tmp_path / "out")
    assert left.exists()


@pytest.mark.skipif(leftovers.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("call", ["os.scandir", "fcntl.flock"])  # of the walk, and of the lock
def test_error_of_a_signals_handler_is_not_taken_for_the_systems(tmp_path: Path, monkeypatch, call: str):
    left = leave(tmp_path / "out", 2 * UNKNOWN_AGE)

    def broken_off(*args: object) -> None:
        raise TimeoutError("of a handler")

    monkeypatch.setattr(call, broken_off)
    with pytest.raises(TimeoutError, match="of a handler"):
        leftovers.remove_leftovers(tmp_path / "out")
    assert left.exists()


def test_leftover_without_files_is_removed_when_its_folders_are_old(tmp_path: Path):
    left = leave(tmp_path / "out", 2 * UNKNOWN_AGE, locked=False)
    (left / "out" / "half").unlink()  # which changes the folder
    write(tmp_path / "out")
    assert left.exists()
    for path in (left / "out", left):
        os.utime(path, (0, 0))
    write(tmp_path / "out")
    assert not left.exists()


OTHERS = (
    ".out.x.0123abcd.partial .out.0123abcd.x.partial .out.0123.partial out.0123abcd.partial .out.0123abcd.old "
    ".our.0123abcd.partial"
)


@pytest.mark.parametrize("name", OTHERS.split())
def test_what_is_no_leftover_of_this_name_stays(tmp_path: Path, name: str):
    (tmp_path / name / "mine").mkdir(parents=True)
    for path in (tmp_path / name, tmp_path / name / "mine"):
        os.utime(path, (0, 0))
    write(tmp_path / "out")
    assert (tmp_path / name / "mine").exists()


def test_lock_of_a_young_folder_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its writer may be about to take it, and would go on without it."""
    young = leave(tmp_path / "out", UNLOCKED_AGE - 100)
    monkeypatch.setattr(leftovers, "_is_free", lambda folder: pytest.fail("tried"))
    write(tmp_path / "out")
    assert young.exists()


def test_a_link_by_the_name_of_a_leftover_is_not_followed(tmp_path: Path):
    mine = tmp_path / "mine"
    write(mine)
    (tmp_path / ".out.0123abcd.partial").symlink_to(mine)
    for path in (mine, *mine.rglob("*")):
        os.utime(path, (0, 0))
    write(tmp_path / "out")
    assert contents(mine) == {"a": "new", "deep/b": "new"}


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path):
    """Somebody may put a link in the place of a folder that is about to be removed."""
    write(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "link").symlink_to(tmp_path / "mine")
    for name in ("link", "left"):
        leftovers.remove(tmp_path / name)
    assert contents(tmp_path / "mine") == {"a": "new", "deep/b": "new"}
    assert not (tmp_path / "left").exists()


@pytest.mark.skipif(leftovers.fcntl is None, reason="no locks here")
def test_a_folder_in_use_stays_however_old_and_goes_when_its_program_was_killed(tmp_path: Path):
    path = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        for each in (folder, *folder.iterdir()):
            os.utime(each, (0, 0))
        write_file(path)
        assert folder.is_dir()
        holder.kill()
    write_file(path)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(leftovers.fcntl is None, reason="no locks here")
def test_a_folder_in_use_by_this_process_stays(tmp_path: Path):
    path = tmp_path / "out"
    with new_file(path) as file:
        file.write_text("outer")
        for each in (file.parent, *file.parent.iterdir()):
            os.utime(each, (0, 0))
        write_file(path, "inner")
        assert file.read_text() == "outer"
    assert path.read_text() == "outer"


def test_without_locks_the_longer_age_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on Windows."""
    monkeypatch.setattr(leftovers, "fcntl", None)
    left = leave(tmp_path / "out", UNLOCKED_AGE + 100)
    old = leave(tmp_path / "out", UNKNOWN_AGE + 100, "cdef0123")
    write(tmp_path / "out")
    assert (left.exists(), old.exists()) == (True, False)


def test_the_rule_that_is_written_down_is_the_one_that_holds():
    reference = (ROOT / "lightning_lora" / "files" / "README.md").read_text()
    assert (UNLOCKED_AGE, UNKNOWN_AGE) == (60 * 60, 7 * 24 * 60 * 60)
    assert "nothing in it has changed for an hour" in " ".join(reference.split())
    assert "for a week where there are no locks" in " ".join(reference.split())


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_that_cannot_be_written_to_is_removed_too(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch):
    """Told by the modes, because root may delete everywhere."""

    def by_modes(honest: Callable[[str], None]) -> Callable[[str], None]:
        def delete(path: str) -> None:
            if os.stat(os.path.dirname(path)).st_mode & 0o700 != 0o700:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            honest(path)

        return delete

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, by_modes(getattr(os, name)))
    (tmp_path / "left" / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "left" / "link").symlink_to(tmp_path / "mine")
    for path in ("left/deep/deeper", "left/deep", "left"):
        (tmp_path / path).chmod(mode)
    (tmp_path / "mine").chmod(0o500)
    leftovers.remove(tmp_path / "left")
    assert os.listdir(tmp_path) == ["mine"]
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o500


# --- exceptions ---

UNCLOSED = ("ignore:unclosed scandir iterator", "ignore:unclosed file <", "ignore:Exception ignored in")
unclosed = pytest.mark.filterwarnings(*UNCLOSED)  # where an exception comes between opening and `with`


@unclosed
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", [write, write_file])
@pytest.mark.parametrize("there", [True, False])
def test_a_writer_broken_off_at_any_line_leaves_the_old_or_the_new_result_and_nothing_else(
    tmp_path: Path, kind: Callable[..., None], there: bool, exchange: bool, step: int, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    path = tmp_path / "out"
    kind(tmp_path / "whole", "new")
    new, reached, count, seen = contents(tmp_path / "whole"), True, 0, set()
    while reached:
        if there:
            kind(path, "old")
        old = contents(path) if there else {}
        reached = break_off(lambda: kind(path, "new"), count)
        found = contents(path) if path.exists() else {}
        assert found in (old, new), count
        assert {entry.name for entry in tmp_path.iterdir()} <= {"out", "whole"}, count
        seen.add(found == new)
        if path.is_dir():
            leftovers.remove(path)
        path.unlink(missing_ok=True)
        count += step
    assert (count > 100, seen) == (True, {True, False})


def test_a_check_of_an_output_broken_off_at_any_line_leaves_nothing(tmp_path: Path):
    count = 0
    while break_off(lambda: check_output_path(tmp_path / "out", folder=True), count):
        assert os.listdir(tmp_path) == []
        count += 1
    assert count > 8


@unclosed
def test_a_removal_broken_off_at_any_line_of_the_standard_library_too_fails_with_nothing_else(tmp_path: Path):
    """shutil.rmtree may close a file descriptor twice then, and hide the exception behind its own."""
    count, reached = 0, True
    while reached:
        write(tmp_path / "left")
        reached = break_off(lambda: leftovers.remove(tmp_path / "left"), count, also=(os.__file__, shutil.__file__))
        leftovers.remove(tmp_path / "left")
        assert os.listdir(tmp_path) == []
        count += 1
    assert count > 20


class ExpiredError(Exception):
    """A timeout that is no OSError, unlike TimeoutError, which the standard library takes for the system's answer."""


@pytest.fixture
def _raising_alarm() -> Iterator[None]:
    def expire(number: int, frame: object) -> None:
        raise ExpiredError

    before = signal.signal(signal.SIGALRM, expire), signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before[0])
    signal.setitimer(signal.ITIMER_REAL, *before[1])


# Where the alarm comes between opening and `with`, in the standard library too.
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator", "ignore:unclosed file <", "ignore:Exception ignored in")
@unclosed
@pytest.mark.usefixtures("_raising_alarm")
@pytest.mark.parametrize("kind", [write, write_file])
def test_an_alarm_whose_handler_raises_leaves_the_old_or_the_new_result_and_nothing_else(
    tmp_path: Path, kind: Callable[..., None]
):
    path, hits = tmp_path / "out", 0
    kind(path, "old")
    kind(tmp_path / "whole", "new")
    old, new = contents(path), contents(tmp_path / "whole")
    for microseconds in range(10, 1510, 50):
        with suppress(ExpiredError):
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
            try:
                kind(path, "new" if contents(path) == old else "old")
                signal.setitimer(signal.ITIMER_REAL, 0)
            except ExpiredError:
                hits += 1
        assert contents(path) in (old, new)
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", "whole"}
    assert hits
