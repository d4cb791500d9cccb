"""Reading what others wrote: nothing is unpickled beyond weights_only, and every failure is a LoRAError."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import LoRAError
from .header import read_header

PathLike = str | os.PathLike[str]


def read_torch_file(path: PathLike, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint or state dict, on the CPU, or on "meta" without its values.

    Raises:
        LoRAError: no such file, truncated, not a dictionary, or it holds more than plain types and tensors.
    """
    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says enough
            content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoRAError(
            f"{path}: holds objects other than plain types and tensors, or is damaged, and was not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # torch raises whatever a damaged file leads it to
        raise LoRAError(f"{path}: cannot be read as a checkpoint; it may be truncated: {error}") from error
    if not isinstance(content, dict):
        raise LoRAError(f"{path}: expected a dictionary, found {type(content).__name__}.")
    return content


def read_safetensors(path: PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header's metadata.

    Raises:
        LoRAError: no such file, or not a whole safetensors file.
    """
    _require_file(path)
    read_header(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoRAError(f"{path}: cannot be read as safetensors; it may be truncated: {error}") from error


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
