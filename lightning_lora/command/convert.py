"""Adapters from one form on disk to another: Lightning checkpoints, PEFT folders and bare state dicts."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.lightning_checkpoint import FORMAT_VERSION, in_one_storage
from ..adapter.metadata import to_metadata
from ..adapter.peft_folder import write_folder
from ..adapter.save_load import adapter_with_options
from ..errors import LoRAError
from ..files.atomic import new_file
from ..files.paths import PathLike
from ..names import META


def to_peft(source: PathLike, target: PathLike, lora_alpha: float | None = None) -> Adapter:
    """Write any adapter as a PEFT folder; returns it."""
    adapter = adapter_with_options(source, lora_alpha)
    write_folder(adapter, target)
    return adapter


def to_lightning(source: PathLike, target: PathLike, lora_alpha: float | None = None) -> Adapter:
    """Write any adapter as a Lightning checkpoint of the kind "adapter"; returns it.

    Its names are the network's; loading finds the attribute of the LightningModule that they belong to.
    """
    adapter = adapter_with_options(source, lora_alpha)
    if Path(target).suffix != ".ckpt":
        raise LoRAError(f"import: {target} is to be a Lightning checkpoint; its name must end in '.ckpt'.")
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": in_one_storage(adapter.tensors),
        META: {"format_version": FORMAT_VERSION, "kind": "adapter", **to_metadata(adapter)},
    }
    with new_file(target) as file:
        torch.save(checkpoint, file)
    return adapter
