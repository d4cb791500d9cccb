"""Adapters from one form on disk to another: Lightning checkpoints, PEFT folders and bare state dicts."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter, spelled_out
from .atomic import new_file
from .base import B
from .config import LoRAConfig
from .description import description_of
from .errors import LoRAError
from .files import PathLike
from .one_storage import in_one_storage
from .peft_format import write_folder
from .saving import FORMAT_VERSION, META
from .transfer import read_adapter


def adapter_with_options(path: PathLike, lora_alpha: float | None = None) -> Adapter:
    """The adapter in a file or folder, ready to be applied.

    Args:
        path: any form of adapter.
        lora_alpha: for one that does not store it, as loralib's do not.

    Raises:
        LoRAError: lora_alpha is missing, or is stored and given.
    """
    adapter = read_adapter(path)
    if not adapter.layers():
        raise LoRAError(f"{path}: holds no lora_A; it is not an adapter of a known format.")
    if adapter.config is not None:
        if lora_alpha is not None:
            raise LoRAError(f"{path}: stores its lora_alpha; it cannot be given another.")
        return adapter
    if lora_alpha is None:
        raise LoRAError(
            f"{path}: stores tensors and no options, as loralib's files do: lora_alpha is nowhere in it. Ask whoever "
            "trained it, and pass --lora-alpha."
        )
    return _with_alpha(adapter, lora_alpha, path)


def _with_alpha(adapter: Adapter, lora_alpha: float, path: PathLike) -> Adapter:
    layers = adapter.layers()
    ranks = {name: adapter.tensors[f"{name}.{B}"].shape[1] for name in layers}
    for name in layers:
        if adapter.tensors[f"{name}.lora_A"].shape[0] != ranks[name]:
            raise LoRAError(
                f"{path}: {name!r} adapts parts of a fused projection, and which is not stored; load it in Python onto "
                "a model injected with enable_lora."
            )
    config = LoRAConfig(r=next(iter(ranks.values())), lora_alpha=lora_alpha, target_modules=layers)
    scalings = {name: lora_alpha / rank for name, rank in ranks.items()}
    adapter = replace(adapter, config=config, scalings=scalings)
    return adapter if len(set(ranks.values())) == 1 else replace(adapter, config=_spelled(adapter, ranks))


def _spelled(adapter: Adapter, ranks: dict[str, int]) -> LoRAConfig:
    assert adapter.config is not None
    return replace(adapter.config, **spelled_out(adapter, ranks))


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
        META: {"format_version": FORMAT_VERSION, "kind": "adapter", **description_of(adapter)},
    }
    with new_file(target) as file:
        torch.save(checkpoint, file)
    return adapter
