"""Folders that DeepSpeed wrote: which file in them is an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..files.paths import PathLike, given_path, kind_of

BESIDE_ENGINE = "adapter.ckpt"  # the ordinary checkpoint, whatever its kind; LoRACallback writes it
OF_ENGINE = "latest"  # a file in each folder that DeepSpeed wrote


def file_beside_engine(path: PathLike) -> Path:
    """Return the ordinary checkpoint in a folder that DeepSpeed wrote. Any other path is returned as it is.

    DeepSpeed's own files are pickles of objects, and are not read.
    """
    path = given_path(path)
    file = path / BESIDE_ENGINE
    return file if kind_of(path / OF_ENGINE) == "file" and kind_of(file) == "file" else path
