"""Read paths and JSON files; a path or file that cannot be read raises LoRAError."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..errors import LoRAError, sentence

PathLike = str | os.PathLike[str]


@contextmanager
def reading(path: PathLike, form: str) -> Iterator[None]:
    """Raise LoRAError with the file's name where something inside the block fails.

    Args:
        path: of the file that is read inside.
        form: that the file should have.
    """
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything
        raise LoRAError(f"{path}: cannot be read as {form}; it may be truncated: {sentence(error)}") from error


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoRAError: there is no such file, or it holds no JSON object.
    """
    require_file(path)
    with reading(path, "JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in indented lines, as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def kind_of(path: PathLike) -> Literal["file", "folder", "other", "nothing"]:
    """Return what is at a path.

    Raises:
        LoRAError: the system does not say, as for a path in a folder that may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise LoRAError(f"{path}: cannot be accessed: {sentence(reason_of(error))}") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def reason_of(error: Exception) -> str:
    """Return the operating system's reason, without the number of the error and the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def require_file(path: PathLike) -> None:
    """Raise LoRAError where there is no file."""
    if kind_of(path) != "file":
        raise LoRAError(f"{path}: there is no such file.")
