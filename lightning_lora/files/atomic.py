"""Files and folders that appear whole or not at all: written beside their place under another name, then moved there.

A killed program leaves the old content in place, and at most a hidden `.NAME.*.partial` folder beside it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import LoRAError
from .paths import PathLike

AT_FDCWD, EXCHANGE = -100, 2


@contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
    """Where to write a file that takes its place at `path` when the block ends without an error."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise LoRAError(f"{path}: is a folder; give the name of a file.")
    with _scratch_beside(target) as scratch:
        yield scratch / target.name
        _to_disk(scratch / target.name)
        os.replace(scratch / target.name, target)


@contextmanager
def new_folder(path: PathLike, *, keep_others: bool = False, replaced: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder that takes its place at `path` when the block ends without an error.

    Args:
        path: where; a folder that is there already is replaced in one step.
        keep_others: what else is in that folder is in the new one too.
        replaced: patterns of names of which the new folder holds what is written, and nothing else.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise LoRAError(f"{path}: is a file; give the name of a folder.")
    with _scratch_beside(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        if keep_others and target.is_dir():
            _take_along(target, folder, replaced)
        for file in folder.rglob("*"):
            if file.is_file() and file.stat().st_nlink == 1:
                _to_disk(file)
        _put_in_place(folder, target, scratch)


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise LoRAError(f"{target}: cannot be written there: {error}") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_along(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Files by a second name rather than a copy, where the file system has that."""
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(fnmatchcase(entry.name, pattern) for pattern in replaced):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: PathLike, target: PathLike) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _to_disk(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _put_in_place(folder: Path, target: Path, scratch: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:  # something is there, perhaps since a moment ago: another rank may write the same
        if not target.is_dir():
            raise
        if not _exchange(folder, target):  # no such call here: two steps, with a moment between them
            os.rename(target, scratch / "old")
            os.rename(folder, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, which Linux and macOS can and Python has no name for."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(bytes(one), bytes(other), EXCHANGE) == 0)
    return False
