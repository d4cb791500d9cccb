"""In which form something is stored at a path. This is the one place that tells a folder's form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import LoRAError
from ..files.paths import PathLike, kind_of
from ..files.safetensors import SUFFIX
from ..names import listed

CONFIG_FILE = "adapter_config.json"  # PEFT's, with the options

Form = Literal["PEFT folder", "folder", "safetensors file", "torch file"]


def form_of(path: PathLike) -> Form:
    """Return the form of what is at a path, by its name and by names of files in it. No file is read.

    "folder" is any other folder, such as one of transformers. What is not there is a "torch file".

    Raises:
        LoRAError: the system does not say what is there.
    """
    path = Path(path)
    if kind_of(path) != "folder":
        return "safetensors file" if path.suffix == SUFFIX else "torch file"
    return "folder" if kind_of(path / CONFIG_FILE) == "nothing" else "PEFT folder"


def refuse_peft_folder(path: PathLike) -> None:
    """Raise LoRAError where a PEFT folder, or the safetensors file in it, is given for a checkpoint."""
    form = form_of(path)
    if form in ("PEFT folder", "safetensors file"):
        raise LoRAError(
            f"{path}: is a {form}, and no checkpoint. Call load_adapter(model, {str(path)!r}) instead; a Trainer "
            "then takes that model, LoRACallback() without options, and no ckpt_path."
        )


def refuse_named_adapters(path: PathLike) -> None:
    """Refuse the folder around adapters that PEFT has saved by name, each in a folder of its own.

    Raises:
        LoRAError: a folder holds such folders, and neither options nor weights itself.
    """
    folder = Path(path)
    if kind_of(folder) != "folder" or kind_of(folder / CONFIG_FILE) != "nothing" or any(folder.glob(f"*{SUFFIX}")):
        return
    named = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}"))
    if named:
        raise LoRAError(
            f"{path}: holds no adapter itself, but folders with one each, as PEFT saves adapters with names of their "
            f"own. Give one of these: {listed(named)}."
        )
