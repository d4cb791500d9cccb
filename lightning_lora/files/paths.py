"""Reading what others wrote: nothing is unpickled beyond weights_only, and every failure is a LoRAError."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import LoRAError

PathLike = str | os.PathLike[str]


def read_json(path: PathLike) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LoRAError: no such file, not JSON, or something else than an object.
    """
    _require_file(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoRAError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _require_file(path: PathLike) -> None:
    if not Path(path).is_file():
        raise LoRAError(f"{path}: there is no such file.")
