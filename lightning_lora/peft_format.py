"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Options and tensors go under PEFT's names; the header of the tensor file also carries this package's own description,
which PEFT does not read. What PEFT has no name for (BatchNorm statistics, say) goes into a second tensor file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .adapter import Adapter
from .base import A, B, LoRALayer
from .config import LoRAConfig
from .errors import LoRAError
from .files import PathLike, read_safetensors
from .injection import require_injection
from .layers import LoRAConv, LoRAEmbedding
from .merge import adapted_layers
from .sharding import Together, full, writes_files
from .state import adapter_state_dict, fingerprint

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
EXTRA_FILE = "lightning_lora.safetensors"
HEADER_KEY = "lightning_lora"
PREFIX = "base_model.model."
SHARED_OPTIONS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern")
NOT_APPLIED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
)


def write_folder(model: nn.Module, path: PathLike) -> None:
    """Write the adapter of an injected model as a PEFT folder. Collective where the model is sharded.

    Raises:
        LoRAError: the model was not injected, or PEFT has no equal of one of its layers.
    """
    injection = require_injection(model, "save_adapter")[2]
    layers = adapted_layers(model)
    for name, layer in layers.items():
        _refuse_without_equal(name, layer)
    state = adapter_state_dict(model)
    named = {name: _peft_name(name, layers, model) for name in state}
    tensors = {named[name] or name: _saved(value) for name, value in state.items() if torch.is_tensor(value)}
    ours = {name for name, peft in named.items() if peft is None}
    own = {
        "config": injection.config.to_dict(),
        "scalings": {name: layer.lora_scaling for name, layer in layers.items()},
        "fingerprint": fingerprint(model),
        "extra": bool(ours),
    }
    folder = Path(path)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", HEADER_KEY: json.dumps(own)}
        _replace(folder / TENSOR_FILE, {n: t for n, t in tensors.items() if n not in ours}, header)
        if ours:
            _replace(folder / EXTRA_FILE, {n: t for n, t in tensors.items() if n in ours}, {"format": "pt"})
        temporary = folder / f".{CONFIG_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(_peft_config(injection.config, list(layers)), indent=2, sort_keys=True) + "\n")
        os.replace(temporary, folder / CONFIG_FILE)

    together = Together(layer.main_weight() for layer in layers.values())
    together.attempt(f"save_adapter to {folder}", write if writes_files(model) else None)
    together.settle()


def read_folder(path: PathLike) -> Adapter:
    """Read a PEFT folder.

    Raises:
        LoRAError: a file is missing or damaged, or it holds what this package cannot apply.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_FILE)
    tensors, header = read_safetensors(folder / TENSOR_FILE)
    renamed = {_our_name(name): tensor for name, tensor in tensors.items()}
    if (folder / EXTRA_FILE).exists():
        renamed |= read_safetensors(folder / EXTRA_FILE)[0]
    if HEADER_KEY in header:
        return Adapter.described(renamed, _own_description(header[HEADER_KEY], folder))
    lora = _config_of(config)
    names = Adapter(renamed).layers()
    return Adapter(renamed, lora, {name: lora.scaling(name) for name in names})


def _own_description(text: str, folder: Path) -> dict[str, Any]:
    try:
        own = json.loads(text)
    except ValueError as error:
        raise LoRAError(f"{folder / TENSOR_FILE}: its description is damaged: {error}") from error
    if not isinstance(own, dict):
        raise LoRAError(f"{folder / TENSOR_FILE}: its description is damaged: it is a {type(own).__name__}.")
    if own.get("extra") and not (folder / EXTRA_FILE).exists():
        raise LoRAError(f"{folder / EXTRA_FILE}: is missing; it holds what PEFT has no name for.")
    return own


def _replace(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    """Under a temporary name first, so that a half-written file never stands in for a good one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), temporary, metadata=header)
    os.replace(temporary, path)


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    return full(tensor).cpu().clone().contiguous()


def _refuse_without_equal(name: str, layer: LoRALayer) -> None:
    if layer.lora_enabled is not None:
        raise LoRAError(f"save_adapter: {name!r} uses enable_lora, which PEFT has not; save a Lightning checkpoint.")
    if isinstance(layer, LoRAConv) and layer.groups != 1:
        raise LoRAError(
            f"save_adapter: {name!r} is a convolution with groups, whose PEFT adapter crosses groups and means another "
            "thing; save a Lightning checkpoint."
        )


def _peft_name(name: str, layers: Mapping[str, LoRALayer], model: nn.Module) -> str | None:
    """PEFT's name of one of our tensors, or None where it has none."""
    path, _, leaf = name.rpartition(".")
    if path in layers and leaf in (A, B):
        if isinstance(layers[path], LoRAEmbedding):
            return f"{PREFIX}{path}.lora_embedding_{leaf[-1]}"
        return f"{PREFIX}{name}.weight"
    if path in layers and leaf == "bias":
        return f"{PREFIX}{path}.base_layer.bias"
    trained = require_injection(model, "save_adapter")[2].trained
    return f"{PREFIX}{name}" if any(name.endswith(known) for known in trained) else None


def _our_name(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for peft, ours in (("lora_A.weight", A), ("lora_B.weight", B), ("lora_embedding_A", A), ("lora_embedding_B", B)):
        if name == peft or name.endswith("." + peft):
            return name.removesuffix(peft) + ours
    return name.replace(".base_layer.", ".")


def _peft_config(config: LoRAConfig, layers: list[str]) -> dict[str, Any]:
    plain = config.to_dict()
    options = {name: plain[name] for name in SHARED_OPTIONS}
    options |= {name: options[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    return options | {
        "peft_type": "LORA",
        "target_modules": layers,
        "modules_to_save": plain["modules_to_save"],
        "init_lora_weights": plain["init_lora_weights"],
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoRAError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise LoRAError(f"{path}: expected a PEFT configuration with peft_type LORA.")
    for option in NOT_APPLIED:
        if config.get(option):
            raise LoRAError(
                f"{path}: {option}={config[option]!r} cannot be applied; only plain LoRA adapters are read."
            )
    return config


def _config_of(config: Mapping[str, Any]) -> LoRAConfig:
    options = {name: config[name] for name in SHARED_OPTIONS if config.get(name) is not None}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if config.get(name):
            options[name] = config[name]
    return LoRAConfig(**options)
