"""Files and folders that appear whole or not at all: written beside their place under another name, then moved there.

A killed program leaves the old content in place, and at most a hidden `.NAME.*.partial` folder beside it. Where names
cannot be exchanged (NFS, Windows) a folder that is replaced is away for a moment: a program that is killed then leaves
it as `.NAME.*.old`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ..errors import LoRAError, sentence
from .paths import PathLike, given_path, kind_of, real_path

AT_FDCWD, EXCHANGE = -100, 2
TRIES = 1000  # to replace a folder that other writers replace too; each failure is another one's success


@contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
    """Yield where to write a file that takes its place at `path` when the block ends without an error.

    Raises:
        LoRAError: it cannot be written there; what was there stays.
    """
    target = _checked(path, folder=False)
    with _scratch_beside(target) as scratch:
        file = scratch / target.name
        yield file
        _to_disk(file)
        with _names_output(path):
            os.replace(file, target)


@contextmanager
def new_folder(path: PathLike, *, keep_others: bool = False, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes its place at `path` when the block ends without an error.

    Several processes or threads may write the same folder at once: one of their results is there at the end, whole.

    Args:
        path: where; a folder that is there already is replaced in one step.
        keep_others: what else is in that folder is in the new one too.
        replaced: patterns of names of which the new folder holds what is written, and nothing else.

    Raises:
        LoRAError: it cannot be written there; what was there stays.
    """
    target = _checked(path, folder=True)
    with _scratch_beside(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                _to_disk(file)
        with _names_output(path):
            _put_in_place(folder, target, partial(_take_along, folder, replaced) if keep_others else lambda old: True)


def check_output_path(path: PathLike, *, folder: bool) -> None:
    """Refuse at once what new_file or new_folder would refuse, and leave no trace.

    Raises:
        LoRAError: `path` is of the other kind, a mount point, or in a folder that cannot be written to.
    """
    target = _checked(path, folder=folder)
    os.rmdir(_hidden_folder(target, next(parent for parent in target.parents if kind_of(parent) != "nothing")))


def identity(path: PathLike) -> tuple[int, int] | None:
    """Return what tells one file or folder from another that comes to its place; None where nothing is."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _checked(path: PathLike, *, folder: bool) -> Path:
    """Return the real path behind links, where it is one that can be replaced."""
    target = real_path(given_path(path))
    kind = kind_of(target)
    if folder and kind not in ("folder", "nothing"):
        raise LoRAError(f"{path}: is a file; give the name of a folder.")
    if not folder and kind == "folder":
        raise LoRAError(f"{path}: is a folder; give the name of a file.")
    if os.path.ismount(target):
        raise LoRAError(f"{path}: is a mount point, which cannot be replaced as a whole; give a name inside it.")
    if folder and kind == "folder" and real_path(".").is_relative_to(target):
        raise LoRAError(
            f"{path}: is the folder that you are in, or holds it, and is not replaced; give a name inside it."
        )
    return target


def _hidden_folder(target: Path, parent: Path) -> Path:
    """Make a folder for what is not complete yet, which proves that its parent can be written to."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise LoRAError(f"{target}: cannot be written there: {sentence(error)}") from error


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    scratch = _hidden_folder(target, target.parent)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _names_output(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoRAError(
            f"{path}: the result was complete and cannot be put there: {error}. See that nothing uses what is there "
            "and that you may replace it, or choose another place."
        ) from error


def _take_along(new: Path, replaced: Collection[str], old: Path) -> bool:
    """Copy what the new folder lacks: by a second name rather than bytes, where the file system has that.

    Returns:
        Whether all is there; False where another writer replaced the old folder meanwhile, and deleted what it held.
    """
    before = identity(old)
    copies: list[Path] = []
    try:
        for entry in old.iterdir():
            copy = new / entry.name
            if os.path.lexists(copy) or any(fnmatchcase(entry.name, pattern) for pattern in replaced):
                continue
            copies.append(copy)
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
            else:
                _link(entry, copy)
        complete = identity(old) == before
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and identity(old) == before:
            raise
        complete = False
    for copy in [] if complete else copies:
        shutil.rmtree(copy) if copy.is_dir() and not copy.is_symlink() else copy.unlink(missing_ok=True)
    return complete


def _link(source: PathLike, target: PathLike) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not os.path.islink(target):
            _to_disk(target)


def _to_disk(file: PathLike) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _put_in_place(folder: Path, target: Path, take_along: Callable[[Path], bool]) -> None:
    """Move a folder to its place, whatever other writers do there meanwhile."""
    old = folder.parent.with_suffix(".old")
    for _ in range(TRIES):
        if _rename(folder, target):
            return
        if not take_along(target):
            continue
        if _exchange(folder, target):
            return
        done = False
        try:  # no such call here: two steps, with a moment between them
            if _rename(target, old):
                done = take_along(old) and _rename(folder, target)  # it may be another than the one above
        finally:
            if done or not _rename(old, target):  # back, but not where the new one or another writer's is
                shutil.rmtree(old, ignore_errors=True)
        if done:
            return
    raise LoRAError(f"{target}: other programs replaced it {TRIES} times meanwhile; let one of them write it.")


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder; False where something is at the target or nothing at the source, perhaps since a moment ago."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, which Linux and macOS can do and Python has no name for; False where it failed."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(AT_FDCWD, bytes(first), AT_FDCWD, bytes(second), EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(bytes(first), bytes(second), EXCHANGE) == 0)
    return False
