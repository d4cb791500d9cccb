"""Write files and folders that appear whole or not at all.

They are written in a hidden folder beside their place, `.NAME.*.partial`, then moved there. A killed program leaves the
old content in place and at most the hidden folder, which the next writer of NAME removes by the rule in leftovers.py.
Where two names cannot be exchanged in one step (NFS, Windows), a replaced folder is away for a moment. A program that
is killed in that moment leaves the old folder as `.NAME.*.old`, which nobody removes.

A result keeps the permissions of what it replaces. Where the target is a link, what the link points to is replaced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ..errors import LoRAError, sentence
from .leftovers import hold, partial_name, release, remove, remove_leftovers
from .paths import PassingOverErrors, PathLike, given_path, is_from_system, is_there, kind_of, real_path

AT_FDCWD, EXCHANGE = -100, 2  # constants of Linux's renameat2
FILE_BITS = 0o777  # without setuid: a new file is not to run with its owner's rights
FOLDER_BITS = 0o7777
TRIES = 1000  # to replace a folder that other writers replace too. Each failure means that another one succeeded.


@contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
    """Yield a path to write a file to. When the block ends without an error, the file is moved to `path`.

    Raises:
        LoRAError: the file cannot be put at `path`. What was there stays.
    """
    target = _checked(path, folder=False)
    with _scratch_beside(target) as scratch:
        file = scratch / target.name
        yield file
        with _names_output(path):
            _to_disk(file)  # before the name: after a power cut the name must not lead to an empty file
            _keep_permissions(target, file)
            os.replace(file, target)
            _folder_to_disk(target.parent)


@contextmanager
def new_folder(path: PathLike, *, keep_others: bool = False, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to fill. When the block ends without an error, the folder is moved to `path`.

    Several processes or threads may write the same folder at once: the result of one of them is there at the end,
    whole.

    Args:
        path: the place. A folder that is there already is replaced in one step.
        keep_others: keep files of the replaced folder that the new one does not hold.
        replaced: patterns of file names that are not kept: of these the new folder holds only what the block wrote.

    Raises:
        LoRAError: the folder cannot be put at `path`. What was there stays.
    """
    target = _checked(path, folder=True)
    with _scratch_beside(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        _keep_permissions(target, folder, writable=True)  # first: with setgid new files get the group of their folder
        yield folder
        with _names_output(path):
            for file in sorted(folder.rglob("*"), reverse=True):  # content before the folder that holds it
                (_folder_to_disk if file.is_dir() else _to_disk)(file)
                _keep_permissions(target / file.relative_to(folder), file)
            _folder_to_disk(folder)
            _keep_permissions(target, folder)
            _put_in_place(folder, target, partial(_take_along, folder, replaced) if keep_others else lambda old: True)
            _folder_to_disk(target.parent)


def check_output_path(path: PathLike, *, folder: bool) -> None:
    """Refuse at once a path that new_file or new_folder would refuse. Leaves no trace.

    Raises:
        LoRAError: `path` is a file for a folder or a folder for a file, is a mount point, or cannot be written to.
    """
    target = _checked(path, folder=folder)
    with _hidden_folder(target, next(parent for parent in target.parents if kind_of(parent) != "nothing")):
        pass


def identity(path: PathLike) -> tuple[int, int] | None:
    """Return a file's or folder's identity, which differs after a replacement; None where nothing is at the path."""
    with PassingOverErrors(), suppress(ValueError):  # a name that no file can have
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def _checked(path: PathLike, *, folder: bool) -> Path:
    """Return the path behind links.

    Raises:
        LoRAError: what is there cannot be replaced.
    """
    target = real_path(given_path(path))
    kind = kind_of(target)
    if folder and kind not in ("folder", "nothing"):
        raise LoRAError(f"{path}: is a file; give the name of a folder.")
    if not folder and kind == "folder":
        raise LoRAError(f"{path}: is a folder; give the name of a file.")
    if kind == "folder" and not os.access(target, os.W_OK | os.X_OK):
        raise LoRAError(f"{path}: is a folder that you may not write to; change its mode, or choose another place.")
    if os.path.ismount(target):
        raise LoRAError(f"{path}: is a mount point, which cannot be replaced as a whole; give a name inside it.")
    if folder and kind == "folder" and real_path(".").is_relative_to(target):
        raise LoRAError(
            f"{path}: is the folder that you are in, or holds it, and is not replaced; give a name inside it."
        )
    return target


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """Yield a hidden folder for incomplete content. Removes the hidden folders of killed writers of this name."""
    with _hidden_folder(target, target.parent) as scratch:
        lock = None
        try:
            with _names_place(target):
                lock = hold(scratch)
            remove_leftovers(target)
            yield scratch
        finally:
            release(lock)


@contextmanager
def _hidden_folder(target: Path, parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` and remove it at the end. Making it proves that `parent` can be written to."""
    folder = parent / partial_name(target, secrets.token_hex(4))
    try:
        try:
            with _names_place(target):
                parent.mkdir(parents=True, exist_ok=True)
                os.mkdir(folder, 0o700)
            yield folder
        finally:
            remove(folder)
    finally:  # once more: an exception of a signal's handler may have broken the first removal off
        remove(folder)


@contextmanager
def _names_place(target: PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_from_system(error) and not isinstance(error, ValueError):
            raise
        raise LoRAError(f"{target}: cannot be written: {sentence(error)}") from error


@contextmanager
def _names_output(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_from_system(error):
            raise
        raise LoRAError(
            f"{path}: the result is complete, but cannot be moved there: {error}. Close programs that use the old "
            "one, see that you may replace it, or choose another place."
        ) from error


def _take_along(new: Path, replaced: Collection[str], old: Path) -> bool:
    """Copy from the old folder what the new one lacks, as hard links where the file system has them.

    Returns:
        True, or False where another writer replaced the old folder meanwhile. Then the copies are removed again.
    """
    before = identity(old)
    copies: list[Path] = []
    try:
        for entry in old.iterdir():
            copy = new / entry.name
            if is_there(copy) or any(fnmatchcase(entry.name, pattern) for pattern in replaced):
                continue
            copies.append(copy)
            _copy(entry, copy)
        _folder_to_disk(new)
        complete = identity(old) == before
    except OSError as error:
        if not is_from_system(error) or (not isinstance(error, FileNotFoundError) and identity(old) == before):
            raise
        complete = False
    for copy in [] if complete else copies:  # the next try copies from another writer's result
        remove(copy) if copy.is_dir() and not copy.is_symlink() else copy.unlink(missing_ok=True)
    return complete


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir() or source.is_symlink():
        _link(source, target)
        return
    target.mkdir()
    for entry in source.iterdir():
        _copy(entry, target / entry.name)
    shutil.copystat(source, target)
    _keep_permissions(source, target)
    _folder_to_disk(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if not is_from_system(error):
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # this file system has no hard links
        if not os.path.islink(target):
            _keep_permissions(source, target)
            _to_disk(target)


def _to_disk(file: PathLike) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _folder_to_disk(folder: PathLike) -> None:
    """Let the names in a folder survive a power cut, where the system can do that for folders."""
    if os.name != "posix":
        return
    with PassingOverErrors():
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _put_in_place(folder: Path, target: Path, take_along: Callable[[Path], bool]) -> None:
    """Move a folder to its place. Tries again while other writers replace what is there."""
    for _ in range(TRIES):
        if _rename(folder, target):  # nothing was there, or an empty folder
            return
        if not take_along(target):  # another writer replaced the target while it was copied from
            continue
        if _exchange(folder, target):
            return
        if _in_two_steps(folder, target, take_along):
            return
    raise LoRAError(f"{target}: other programs replaced it {TRIES} times meanwhile; let one of them write it.")


def _in_two_steps(folder: Path, target: Path, take_along: Callable[[Path], bool]) -> bool:
    """Replace a folder where names cannot be exchanged, with a moment between two steps. Return False to try again."""
    old, done = folder.parent.with_suffix(".old"), False
    away = folder.parent / old.name

    def settle() -> None:
        """Put the old folder back if its place is free; else remove the old folder."""
        if done or not _rename(old, target):
            _rename(old, away)
            remove(away)

    try:
        try:
            if _rename(target, old):
                done = take_along(old) and _rename(folder, target)  # `old` may be another writer's result by now
        finally:
            settle()
    finally:  # once more: an exception of a signal's handler may have broken the first one off
        settle()
    return done


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder. Return False where something is at the target, or nothing at the source."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, by a system call that Python does not offer. Return False where that failed."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(AT_FDCWD, bytes(first), AT_FDCWD, bytes(second), EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(bytes(first), bytes(second), EXCHANGE) == 0)
    return False


def _keep_permissions(old: Path, new: Path, *, writable: bool = False) -> None:
    """Give `new` the mode of `old`, and its owner and group as far as the system allows. Without `old` do nothing.

    Where the group cannot be set, the mode of the group becomes that of all others: members of another group may read
    no more than anybody. On systems without such modes (Windows) nothing is done.

    Args:
        old: what is replaced. Links are followed.
        new: what takes the place of `old`.
        writable: whether this process goes on writing into `new`, whatever the mode says.
    """
    if os.name != "posix" or new.is_symlink():
        return
    before = None
    with PassingOverErrors():
        before = os.stat(old)
    if before is None:
        return
    if stat.S_ISDIR(before.st_mode) != new.is_dir():
        return
    mode = before.st_mode & (FOLDER_BITS if new.is_dir() else FILE_BITS)
    if not _keep_owner(before, new):
        mode &= ~0o070 | (mode & 0o007) << 3
    with PassingOverErrors():  # file systems without modes
        os.chmod(new, mode | (stat.S_IRWXU if writable else 0))


def _keep_owner(before: os.stat_result, new: Path) -> bool:
    """Set owner and group, or else the group alone. Return whether the group is that of `before`."""
    now = os.stat(new)
    for owner in (before.st_uid, -1):
        if (owner, before.st_gid) in ((now.st_uid, now.st_gid), (-1, now.st_gid)):
            return True
        with PassingOverErrors():
            os.chown(new, owner, before.st_gid)
            return True
    return False
