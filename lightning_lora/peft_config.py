"""adapter_config.json: PEFT's options from and to LoRAConfig. What cannot be applied is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapter import Adapter, spelled_out
from .base import B
from .config import LoRAConfig
from .errors import LoRAError
from .targets import around, matcher, suffixes

SHARED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern")
SELECTING = ("target_modules", "exclude_modules", "modules_to_save")
ORIGIN = ("base_model_name_or_path", "revision", "task_type")
OWN_INITS = (True, False, "gaussian", "orthogonal")
# What these start from is not the base any more: their adapter fits only the weights that they left behind.
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options that do not change what the stored tensors mean.
WITHOUT_EFFECT = {
    *("peft_type", "auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config"),
}


def options_to_peft(adapter: Adapter) -> dict[str, Any]:
    """The fields of adapter_config.json for an adapter without enable_lora.

    PEFT's lists match suffixes, so the layers are chosen by the user's own list only where it chooses these alone.
    """
    config = adapter.config or LoRAConfig()
    layers = [name for name in adapter.layers() if adapter.kinds.get(name) != "AttentionOutput"]
    ranks = {name: adapter.tensors[f"{name}.{B}"].shape[1] for name in layers}
    plain = config.to_dict()
    options = {name: plain[name] for name in SHARED}
    options |= {name: options[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    same = all(config.rank(n) == ranks[n] and math.isclose(config.scaling(n), adapter.scalings[n]) for n in layers)
    options |= {} if same else _common_options(adapter, ranks)
    return options | {
        "peft_type": "LORA",
        "target_modules": _targets(adapter, layers),
        "exclude_modules": None,
        "modules_to_save": plain["modules_to_save"],
        "init_lora_weights": plain["init_lora_weights"],
        "fan_in_fan_out": adapter.fan_in_fan_out or "Conv1D" in adapter.kinds.values(),
        "inference_mode": True,
        **{name: adapter.origin.get(name) for name in ORIGIN},
    }


def _common_options(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """One r and lora_alpha where all layers agree, as vLLM needs it; patterns for those that do not."""
    spelled = spelled_out(adapter, ranks)
    return {name: spelled[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}


def _targets(adapter: Adapter, layers: Sequence[str]) -> str | list[str]:
    owners = {name.rpartition(".")[0] for name in (*adapter.tensors, *adapter.fingerprint)} - {""}
    own = adapter.config.target_modules if adapter.config is not None else ()
    for names in (own, layers):
        if not isinstance(names, str) and set(filter(matcher(names), owners)) == set(layers):
            return list(names)
    return "|".join(map(re.escape, layers))


def refuse_options(options: Mapping[str, Any], path: Path) -> None:
    """Raise where adapter_config.json asks for what this package does not apply.

    Raises:
        LoRAError: names the option.
    """
    if options.get("peft_type") != "LORA":
        raise LoRAError(f"{path}: peft_type is {options.get('peft_type')!r}, only 'LORA' is read.")
    known = {*SHARED, *SELECTING, *ORIGIN, *WITHOUT_EFFECT}
    for name, value in options.items():
        if name not in known and value:
            raise LoRAError(f"{path}: {name}={value!r} cannot be applied; only plain LoRA adapters are read.")
    init = options.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        raise LoRAError(
            f"{path}: init_lora_weights={init!r} changed the base weights before training, so the adapter does not fit "
            "the original base; convert it with PEFT's path_initial_model_for_weight_conversion."
        )


def options_from_peft(options: Mapping[str, Any], layers: Sequence[str], saved: Sequence[str]) -> LoRAConfig:
    """LoRAConfig's options out of those of adapter_config.json.

    Args:
        options: what the file holds.
        layers: the adapted layers that the tensors name.
        saved: names of parameters that the tensors hold whole. PEFT adds entries to modules_to_save that may name
            nothing, so those without tensors are dropped.

    Raises:
        LoRAError: an option has a value that is not allowed.
    """
    ours = {name: options[name] for name in (*SHARED, *SELECTING) if options.get(name) is not None}
    entries = ours.get("modules_to_save")
    if isinstance(entries, list):
        named = {suffix for name in saved for module in around(name) for suffix in suffixes(module)}
        entries = [entry for entry in entries if isinstance(entry, str) and entry in named]
        ours["modules_to_save"] = list(dict.fromkeys(entries))
    init = options.get("init_lora_weights", True)
    ours["init_lora_weights"] = init if isinstance(init, (bool, str)) and init in OWN_INITS else True
    return LoRAConfig(**{"target_modules": layers, **ours})


def origin_of(options: Mapping[str, Any]) -> dict[str, str]:
    """What PEFT's options say of the base."""
    return {name: options[name] for name in ORIGIN if isinstance(options.get(name), str)}
