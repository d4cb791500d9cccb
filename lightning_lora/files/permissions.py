"""Permissions: a replaced file or folder keeps its mode; a new one gets the mode that the umask allows."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .paths import passing_over_errors

FILE_BITS = 0o777  # a new program is not to run with another user's rights
FOLDER_BITS = 0o7777


def keep_permissions(old: Path, new: Path, *, writable: bool = False) -> None:
    """Give `new` the mode of `old`, where there is one, and its owner and group as far as the system allows.

    Where it does not allow the group, the group gets no more than all others: it is another one now. Where systems have
    no such modes (Windows), nothing is done.

    Args:
        old: what is replaced; a link stands for what it points to.
        new: what takes its place.
        writable: whether this process goes on writing into it, whatever the mode says.
    """
    if os.name != "posix" or new.is_symlink():
        return
    before = None
    with passing_over_errors():
        before = os.stat(old)
    if before is None:  # nothing is replaced, or nothing that can be looked at
        return
    if stat.S_ISDIR(before.st_mode) != new.is_dir():
        return
    mode = before.st_mode & (FOLDER_BITS if new.is_dir() else FILE_BITS)
    if not _keep_owner(before, new):
        mode &= ~0o070 | (mode & 0o007) << 3
    with passing_over_errors():  # file systems without modes
        os.chmod(new, mode | (stat.S_IRWXU if writable else 0))


def _keep_owner(before: os.stat_result, new: Path) -> bool:
    """Set owner and group, or the group alone; return whether the group is the old one."""
    now = os.stat(new)
    for owner in (before.st_uid, -1):
        if (owner, before.st_gid) in ((now.st_uid, now.st_gid), (-1, now.st_gid)):
            return True
        with passing_over_errors():
            os.chown(new, owner, before.st_gid)
            return True
    return False
