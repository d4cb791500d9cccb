"""Paths, and JSON: of what others wrote every failure to read it is a LoRAError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def require_file(path: PathLike) -> None:
    """Raise a LoRAError where there is no file."""
    if not Path(path).is_file():
        raise LoRAError(f"{path}: there is no such file.")
