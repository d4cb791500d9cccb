"""Ids of repositories on the Hugging Face hub as sources of adapters, where huggingface_hub is installed.

A path that is there always wins, be it a link that leads nowhere. Of a repository only the files of a PEFT folder are
fetched, into huggingface_hub's own cache; without a network, or with HF_HUB_OFFLINE=1, they come out of that cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import LoRAError, sentence
from ..files.paths import PathLike, kind_of
from .forms import CONFIG_FILE

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_NAMES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml", ".csv", ".png")  # ends of no id
FETCHED = (CONFIG_FILE, "adapter_model.safetensors", "adapter_model.bin")
ON_THE_HUB = "and as the id of a repository on the Hugging Face hub"


def local_source(source: PathLike) -> PathLike:
    """Return a path as it is, or the folder of a repository's adapter if it is a text that names one.

    Raises:
        LoRAError: the text can be no path that is there, and the repository cannot be fetched.
    """
    if not isinstance(source, str) or not ID.fullmatch(source) or source.endswith(FILE_NAMES):
        return source
    return source if kind_of(source) != "nothing" or os.path.lexists(source) else _fetched(source)


def _fetched(name: str) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LoRAError(
            f"{name}: there is no such file or folder, {ON_THE_HUB} it needs huggingface_hub: pip install "
            "huggingface_hub."
        ) from None
    try:
        folder = str(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # of the hub's client, of its network library, or of the disk
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LoRAError(
            f"{name}: there is no such file or folder, {ON_THE_HUB} it cannot be fetched: {sentence(reason)}"
        ) from error
    if kind_of(Path(folder) / CONFIG_FILE) == "nothing":
        raise LoRAError(
            f"{name}: there is no such file or folder, {ON_THE_HUB} it holds no {CONFIG_FILE}, and so no adapter."
        )
    return folder
