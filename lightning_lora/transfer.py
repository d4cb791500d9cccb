"""save_adapter, load_adapter and load_from_checkpoint: adapters out of and into models."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .adapter import Adapter
from .checkpoint import adapter_of, read
from .description import adapter_of_model
from .errors import LoRAError
from .factors import check_factors
from .files import PathLike, read_torch_file
from .fit import fit_
from .inject import inject
from .merge import adapted_layers
from .peft_format import read_folder, read_tensor_file, write_folder
from .saving import META
from .sharding import Together, writes_files

Module = TypeVar("Module", bound=nn.Module)


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the adapter as a folder in PEFT's format. Collective where the model is sharded.

    Raises:
        LoRAError: the model was not injected, or PEFT has no equal of one of its layers.
    """
    adapter = adapter_of_model(model)
    together = Together(layer.main_weight() for layer in adapted_layers(model).values())
    writes = writes_files(model)
    together.attempt(f"save_adapter to {path}", (lambda: write_folder(adapter, path)) if writes else None)
    together.settle()


def load_adapter(model: nn.Module, source: PathLike | Mapping[str, Any], *, strict_base: bool = True) -> list[str]:
    """Put a saved adapter onto a model, injected or not.

    Args:
        model: a model with the base that the adapter was trained on.
        source: a PEFT folder, a Lightning checkpoint of any kind, a file with a state dict, or a state dict. A source
            without options (a bare state dict) needs an injected model.
        strict_base: whether another base than the adapter's is an error or a warning.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: the source is damaged or does not fit; the model is as it was.
    """
    return fit_(model, read_adapter(source), strict_base=strict_base)


def read_adapter(source: PathLike | Mapping[str, Any]) -> Adapter:
    """The adapter in any of the forms that load_adapter takes."""
    if isinstance(source, (str, os.PathLike)):
        if Path(source).is_dir():
            return read_folder(source)
        if Path(source).suffix == ".safetensors":
            return read_tensor_file(source)
        source = read_torch_file(source)
    if not isinstance(source, Mapping):
        raise LoRAError(f"load_adapter: expected a path or a state dict, found {type(source).__name__}.")
    if META in source:
        return adapter_of(source)[0]
    state = source.get("state_dict", source)
    if not isinstance(state, Mapping):
        raise LoRAError(f"load_adapter: expected a state dict, found {type(state).__name__}.")
    adapter = Adapter({n: v for n, v in state.items() if isinstance(n, str) and isinstance(v, torch.Tensor)})
    check_factors(adapter, "adapter")
    return adapter


def load_from_checkpoint(cls: type[Module], path: PathLike, **kwargs: Any) -> Module:
    """Build a LightningModule from a checkpoint's hyperparameters, as Lightning does, and load its adapter.

    The base weights are those that the class builds; for a full checkpoint, those in the file.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint of any kind that this package wrote.
        kwargs: hyperparameters that override the saved ones.

    Raises:
        LoRAError: the file is damaged, has no adapter, or belongs to another base.
    """
    checkpoint = read_torch_file(path)
    adapter, kind = adapter_of(checkpoint)
    model = _build(cls, checkpoint, kwargs)
    if kind != "full":
        fit_(model, adapter)
        return model
    if adapter.config is not None:
        inject(model, adapter.config)
    read(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def _build(cls: type[Module], checkpoint: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Module:
    """Lightning's own construction, from the checkpoint without its weights."""
    bare = {name: value for name, value in checkpoint.items() if name != META} | {"state_dict": {}}
    buffer = io.BytesIO()
    torch.save(bare, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        return cast(Module, cast(Any, cls).load_from_checkpoint(buffer, strict=False, **kwargs))
