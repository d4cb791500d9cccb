"""Remove the hidden folders of writers that were killed, and leave those that are in use.

A writer holds a lock on a file in its hidden folder. The system drops the lock when the process ends, however it ends.
The next writer of the same name takes a hidden folder for a leftover where

- its lock is free, and nothing in it has changed for an hour, or
- it has no lock (Windows, file systems without locks, a writer killed before it took one), and nothing in it has
  changed for a week.

The hour is there because some file systems do not show a lock to other machines.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from types import ModuleType

from .paths import PassingOverErrors, is_from_system, is_there

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUFFIX, LOCK = ".partial", ".lock"
UNLOCKED_AGE, UNKNOWN_AGE = 3600, 7 * 24 * 3600  # seconds without a change


def partial_name(target: Path, token: str) -> str:
    """Return the name of the hidden folder in which `target` is written. `token` tells writers apart."""
    return f".{target.name}.{token}{SUFFIX}"


def hold(folder: Path) -> int | None:
    """Lock a folder until `release` is called with the result, or until the process ends."""
    if fcntl is None:
        return None
    lock = os.open(_lock_in(folder), os.O_RDWR | os.O_CREAT, 0o600)
    with PassingOverErrors():  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def release(lock: int | None) -> None:
    """Release the lock that `hold` returned."""
    if lock is not None:
        os.close(lock)


def remove(folder: Path) -> None:
    """Delete a folder and its content, also where the mode of a folder forbids writing. What cannot be deleted stays.

    A link stays, and so does what it leads to. Raises nothing, apart from exceptions of signals' handlers.
    """
    with PassingOverErrors():  # a name that no folder can have
        if folder.is_symlink():
            return
    _remove_what_can_be(folder)
    if not os.path.isdir(folder):
        return
    _make_writable(folder)
    for path, names, _ in os.walk(folder, onerror=_pass_over):  # outer folders first, so that inner ones can be reached
        for name in names:
            _make_writable(Path(path, name))
    _remove_what_can_be(folder)


def _remove_what_can_be(folder: Path) -> None:
    """Delete from the inside out.

    Not by shutil.rmtree: where a signal's handler raises in it, it may close a file descriptor twice. It then fails
    with an OSError of its own instead of the handler's exception, or closes what another thread has just opened.
    """
    for path, folders, files in os.walk(folder, topdown=False, onerror=_pass_over):
        for name in (*files, *folders):  # of the folders links are left: they are deleted as files are
            with PassingOverErrors():
                os.unlink(os.path.join(path, name))
        with PassingOverErrors():
            os.rmdir(path)


def _pass_over(error: OSError) -> None:
    if not is_from_system(error):
        raise error


def _make_writable(folder: Path) -> None:
    if not folder.is_symlink():
        with PassingOverErrors():
            os.chmod(folder, stat.S_IRWXU)


def remove_leftovers(target: Path) -> None:
    """Remove the hidden folders in which killed writers of this file or folder worked."""
    token = re.compile(r"[0-9a-f]{8}")  # as secrets.token_hex(4) makes it
    start, end = partial_name(target, "\0").split("\0")
    with PassingOverErrors():
        for name in os.listdir(target.parent):
            if name.startswith(start) and name.endswith(end) and token.fullmatch(name[len(start) : -len(end)]):
                folder = target.parent / name
                with PassingOverErrors():
                    if not folder.is_symlink() and _is_left(folder):
                        remove(folder)


def _is_left(folder: Path) -> bool:
    age = time.time() - _last_change(folder)
    if age < UNLOCKED_AGE:
        return False  # before the lock is tried, which its writer may be about to take
    is_free = _is_free(folder)
    return age >= UNKNOWN_AGE if is_free is None else is_free


def _last_change(folder: Path) -> float:
    walk = os.walk(folder, onerror=_pass_over)
    paths = (os.path.join(path, name) for path, _, files in walk for name in (".", *files))
    return max((os.lstat(path).st_mtime for path in paths), default=time.time())


def _is_free(folder: Path) -> bool | None:
    """Return whether a folder's lock is free, or None where there is no lock."""
    if fcntl is None or not is_there(_lock_in(folder)):
        return None
    lock = os.open(_lock_in(folder), os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if not is_from_system(error):
            raise
        return None
    finally:
        os.close(lock)
    return True


def _lock_in(folder: Path) -> Path:
    """Return the file to lock. Its name holds the random token: the result, in the same folder, has another name."""
    return folder / f"{folder.name.split('.')[-2]}{LOCK}"
