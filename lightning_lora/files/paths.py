"""Paths, and JSON: of what others wrote every failure to read it is a LoRAError."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoRAError, sentence

PathLike = str | os.PathLike[str]


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoRAError: no such file, not JSON, or something else than an object.
    """
    require_file(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoRAError(f"{path}: cannot be read as JSON: {sentence(error)}") from error
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does, in lines."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_file(path: PathLike) -> None:
    """Raise a LoRAError where there is no file."""
    if not Path(path).is_file():
        raise LoRAError(f"{path}: there is no such file.")
