"""In which form something is stored at a path. This is the one place that tells a folder's form."""

from __future__ import annotations

from typing import Literal

from ..files.paths import PathLike, given_path, kind_of
from ..files.safetensors import SUFFIX
from .deepspeed_folder import file_beside_engine
from .distributed_folder import is_distributed

CONFIG_FILE = "adapter_config.json"  # PEFT's, with the options

Form = Literal["PEFT folder", "DeepSpeed folder", "distributed folder", "folder", "safetensors file", "torch file"]


def form_of(path: PathLike) -> Form:
    """Return the form of what is at a path, by its name and by names of files in it. No file is read.

    "folder" is any other folder, such as one of transformers. What is not there is a "torch file".

    Raises:
        LoRAError: the path cannot be one, or the system does not say what is there.
    """
    path = given_path(path)
    if kind_of(path) != "folder":
        return "safetensors file" if path.suffix == SUFFIX else "torch file"
    if kind_of(path / CONFIG_FILE) != "nothing":
        return "PEFT folder"
    if file_beside_engine(path) != path:
        return "DeepSpeed folder"
    return "distributed folder" if is_distributed(path) else "folder"
