"""Paths, and JSON: of what others wrote every failure to read it is a LoRAError."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ..errors import LoRAError, sentence
from .limits import JSON_BYTES, JSON_PARTS, Limit, check

PathLike = str | os.PathLike[str]


def read_json(path: PathLike, most: Limit = JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoRAError: no such file, larger than `most`, not JSON, or something else than an object.
    """
    require_file(path)
    check(most, Path(path).stat().st_size, path)
    try:
        content = parse_json(Path(path).read_bytes(), path)
    except LoRAError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LoRAError(f"{path}: cannot be read as JSON: {sentence(error)}") from error
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def parse_json(text: bytes, where: object, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return what JSON says, where it is not more than a limit.

    Args:
        text: encoded in UTF-8.
        where: for messages.
        pairs: makes an object of its names and values, where that is not a dictionary.

    Raises:
        LoRAError: it has too many parts.
        ValueError, RecursionError: it is no JSON.
    """
    check(JSON_PARTS, sum(map(text.count, (b",", b"[", b"{"))), where)
    return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does, in lines."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def given_path(path: PathLike) -> Path:
    """Return a path that a user gave.

    Raises:
        LoRAError: it is none, or empty, which Python takes for the current folder.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise LoRAError(f"{path!r:.80}: is no path; give the name of a file or folder.")
    if not text:
        raise LoRAError(f"{path!r}: is an empty path; give the name of a file or folder, '.' for the current folder.")
    return Path(path)


def kind_of(path: PathLike) -> Literal["file", "folder", "other", "nothing"]:
    """Return what is at a path.

    Raises:
        LoRAError: that cannot be told, as in a folder that may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:  # a ValueError is of a name that no file can have
        if not isinstance(error, ValueError) and not is_from_system(error):
            raise
        raise LoRAError(f"{path}: cannot be looked at: {sentence(reason_of(error))}") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def real_path(path: PathLike) -> Path:
    """Return where a path leads, behind links.

    Raises:
        LoRAError: it is a name that no file can have, or a relative one whose folder was deleted.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        if not isinstance(error, ValueError) and not is_from_system(error):
            raise
        raise LoRAError(f"{path}: is a path that leads nowhere: {sentence(reason_of(error))}") from error


def reason_of(error: Exception) -> str:
    """Return what an error of the operating system says, without its number and the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def is_from_system(error: BaseException) -> bool:
    """Return whether an error is the system's answer; a TimeoutError that a signal's handler raises has no number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def passing_over_errors() -> Iterator[None]:
    """Go on after the block where the system refuses something in it."""
    try:
        yield
    except OSError as error:
        if not is_from_system(error):
            raise


def is_there(path: PathLike) -> bool:
    """Return whether something is at a path, a broken link too.

    os.path.lexists takes a timeout that a signal's handler raises meanwhile for an answer.
    """
    with passing_over_errors(), suppress(ValueError):  # which is of a name that no file can have
        os.lstat(path)
        return True
    return False


def require_file(path: PathLike) -> None:
    """Raise a LoRAError where there is no file."""
    if kind_of(given_path(path)) != "file":
        raise LoRAError(f"{path}: there is no such file.")
