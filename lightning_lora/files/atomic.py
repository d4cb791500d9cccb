"""Write files and folders, so that each file takes its place in one step.

A result is written in a hidden folder, `.NAME.*.partial`, then moved to its place: a new file or folder appears whole.
In a folder that exists, files are replaced one by one, and what the writer did not write stays. A killed program leaves
at most the hidden folder. Where the target is a link, what the link points to is replaced.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import LoRAError, sentence
from .paths import PathLike, kind_of, reason_of

SUFFIX = ".partial"
MODE_BITS = 0o777  # without setuid: a new file is not to run with its owner's rights


@contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
    """Yield a path to write a file to. When the block ends without an error, the file is moved to `path`.

    Raises:
        LoRAError: the file cannot be put at `path`. What was there stays.
    """
    target = _checked(path, folder=False)
    with _hidden_folder(target, target.parent) as hidden:
        file = hidden / target.name
        yield file
        with _names_output(path):
            _to_disk(file)
            _replace(file, target)


@contextmanager
def new_folder(path: PathLike, *, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to fill. When the block ends without an error, what is in it is moved to `path`.

    A new folder appears whole. In a folder that exists, each file replaces the one of its name.

    Args:
        path: the place.
        replaced: patterns of names. Older files of these names are removed where the block did not write them.

    Raises:
        LoRAError: the files cannot be put at `path`.
    """
    target = _checked(path, folder=True)
    with _hidden_folder(target, target if os.path.ismount(target) else target.parent) as hidden:
        folder = hidden / target.name
        folder.mkdir()
        yield folder
        with _names_output(path):
            for file in _files_in(folder):
                _to_disk(file)
            if target.is_dir() or not _moved(folder, target):
                _fill(target, folder, replaced)


def check_output_path(path: PathLike, *, folder: bool) -> None:
    """Refuse at once a path that new_file or new_folder would refuse. Leaves no trace.

    Raises:
        LoRAError: `path` is a file for a folder or a folder for a file, or cannot be written to.
    """
    target = _checked(path, folder=folder)
    with _hidden_folder(target, next(parent for parent in target.parents if kind_of(parent) != "nothing")):
        pass


def _checked(path: PathLike, *, folder: bool) -> Path:
    """Return the path behind links.

    Raises:
        LoRAError: what is there is of another kind, or may not be written to.
    """
    target = Path(os.path.realpath(path))
    kind = kind_of(target)
    if folder and kind not in ("folder", "nothing"):
        raise LoRAError(f"{path}: is a file; give the name of a folder.")
    if not folder and kind == "folder":
        raise LoRAError(f"{path}: is a folder; give the name of a file.")
    if kind == "folder" and not os.access(target, os.W_OK | os.X_OK):
        raise LoRAError(f"{path}: is a folder that you may not write to; change its mode, or choose another place.")
    return target


@contextmanager
def _hidden_folder(target: Path, parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` and remove it at the end. Making it proves that `parent` can be written to."""
    folder = parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}"
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(folder, 0o700)
        except (OSError, ValueError) as error:
            raise LoRAError(f"{target}: cannot be written: {sentence(reason_of(error))}") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _names_output(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoRAError(
            f"{path}: the result is complete, but cannot be moved there: {error}. Close programs that use the old "
            "one, see that you may replace it, or choose another place."
        ) from error


def _files_in(folder: Path) -> list[Path]:
    """List all files, config and index last: what they say is then there already."""
    files = [file for file in folder.rglob("*") if not file.is_dir()]
    return sorted(files, key=lambda file: (file.suffix == ".json", file))


def _moved(folder: Path, target: Path) -> bool:
    """Move a new folder to its place. Return False where another writer has just put one there."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _fill(target: Path, folder: Path, replaced: Collection[str]) -> None:
    """Move files into a folder that exists, and remove those of an earlier result."""
    files = _files_in(folder)
    names = {file.relative_to(folder).parts[0] for file in files}
    for file in files:
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, place)
    for old in reversed(_files_in(target)):  # the index first
        if old.parent == target and old.name not in names and any(fnmatchcase(old.name, each) for each in replaced):
            old.unlink(missing_ok=True)  # another writer may be faster


def _replace(file: Path, target: Path) -> None:
    """Put a file in its place, with the mode of what it replaces."""
    with suppress(OSError):  # nothing is there, or the file system has no modes
        os.chmod(file, os.stat(target).st_mode & MODE_BITS)
    os.replace(file, target)


def _to_disk(file: Path) -> None:
    """Write a file through before it gets its name: after a power cut the name must not lead to an empty file."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
