"""save_adapter, load_adapter and load_from_checkpoint: adapters out of and into models."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.rank_sync import RankSync, writes_files
from ..errors import LoRAError
from ..files.paths import PathLike
from ..files.torch_archive import read_torch_file
from ..model.inject import inject, unload
from ..model.injection import find_injection
from ..model.targets import Targets
from ..names import META, B
from ..nn.lora_layer import adapted_layers
from .adapter import Adapter, check_factors, spelled_out, without_options
from .apply import add_frozen_weights, align_names, by_first_names, check_adapter, copy_values, split_off_base
from .lightning_checkpoint import adapter_of, read
from .metadata import adapter_of_model
from .peft_folder import read_folder, read_tensor_file, write_folder


def apply_adapter(model: nn.Module, adapter: Adapter, *, strict_base: bool = True) -> list[str]:
    """Put an adapter onto a model: inject where that is still to do, check everything, then copy the values.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    adapter = by_first_names(model, align_names(model, adapter))
    fresh = find_injection(model) is None
    if fresh:
        inject(model, _config_for(model, adapter))
    try:
        adapter = add_frozen_weights(model, split_off_base(model, adapter))
        check_adapter(model, adapter, strict_base=strict_base)
        copy_values(model, adapter)
    except BaseException:
        if fresh:
            unload(model)
        raise
    return list(adapted_layers(model))


def _config_for(model: nn.Module, adapter: Adapter) -> LoRAConfig:
    """The adapter's options; where they choose other layers under this prefix, the same with the layers spelled out."""
    config = adapter.config
    layers = adapter.layers()
    if config is None:
        raise LoRAError(without_options(adapter))
    targets = Targets(model, config)
    ranks = {name: adapter.tensors[f"{name}.{B}"].shape[1] for name in layers}
    same = all(config.rank(n) == ranks[n] and math.isclose(config.scaling(n), s) for n, s in adapter.scalings.items())
    if same and not targets.unmatched and set(targets.layers) == set(layers):
        return config
    return replace(config, **spelled_out(adapter, ranks))


Module = TypeVar("Module", bound=nn.Module)


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the adapter as a folder in PEFT's format. Collective where the model is sharded.

    Raises:
        LoRAError: the model was not injected, or PEFT has no equal of one of its layers.
    """
    adapter = adapter_of_model(model)
    sync = RankSync(layer.main_weight() for layer in adapted_layers(model).values())
    writes = writes_files(model)
    sync.run(f"save_adapter to {path}", (lambda: write_folder(adapter, path)) if writes else None)
    sync.raise_on_any_rank()


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
    return apply_adapter(model, read_adapter(source), strict_base=strict_base)


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
        apply_adapter(model, adapter)
        return model
    inject(model, _config_for(model, adapter))
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
