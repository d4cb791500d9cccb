"""PEFT's options, tensor names and meaning, from and to ours. What cannot be applied is refused by name.

PEFT wraps a layer, so that what the layer owns moves to `<layer>.base_layer`; it wraps attention and the attention's
out_proj, one inside the other.

enable_lora: n parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r with the same A and a B
that is block diagonal, with zero rows for the parts that are left alone. The scaling stays, so lora_alpha grows.

Attention's out_proj: peft adds its change twice, in forward and in merge (measured on 0.21.2; a fix is proposed in
huggingface/peft#3774). So B is halved on the way out and doubled on the way in, which is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import A, B, around, matcher, suffixes
from ..nn.low_rank import ATTENTION_OUTPUT, from_block_diagonal, to_block_diagonal
from .adapter import Adapter, spelled_out

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


PREFIX = "base_model.model."

BASE_LAYER = ".base_layer"

FACTORS = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_embedding_A": A,
    "lora_embedding_B": B,
}

REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_B.bias": "lora_bias",
    "lora_A.bias": "lora_bias",
    "trainable_tokens_delta": "trainable_token_indices",
}


def peft_name(name: str, layers: Set[str], kinds: Mapping[str, str]) -> str:
    """PEFT's name of one of our tensors.

    Args:
        name: ours.
        layers: names of the adapted layers.
        kinds: of these, as far as known.
    """
    path, _, leaf = name.rpartition(".")
    if path not in layers:
        return PREFIX + name
    attention = path.rpartition(".")[0]
    place = path
    if kinds.get(path) == "AttentionOutput":
        place = f"{attention}{BASE_LAYER}.out_proj" if attention else "base_layer.out_proj"
    if leaf not in (A, B):
        return f"{PREFIX}{place}{BASE_LAYER}.{leaf}"
    if kinds.get(path) == "Embedding":
        return f"{PREFIX}{place}.lora_embedding_{leaf[-1]}"
    return f"{PREFIX}{place}.{leaf}.weight"


def our_names(peft_names: list[str], where: object) -> dict[str, str]:
    """Our name of each of PEFT's tensors.

    Raises:
        LoRAError: a name says that the adapter is more than plain LoRA, or two names mean the same tensor.
    """
    ours = {name: _our_name(name, where) for name in peft_names}
    first: dict[str, str] = {}
    for name, own in ours.items():
        if own in (A, B):
            raise LoRAError(f"{where}: {name!r} names no layer.")
        if first.setdefault(own, name) != name:
            raise LoRAError(f"{where}: {first[own]!r} and {name!r} both mean {own!r}; the file is damaged.")
    return ours


def _our_name(name: str, where: object) -> str:
    bare = name.removeprefix(PREFIX)
    for leaf, feature in REFUSED.items():
        if bare == leaf or bare.endswith(f".{leaf}"):
            raise LoRAError(f"{where}: {name!r} belongs to {feature}, which cannot be applied; plain LoRA is read.")
    if f"{BASE_LAYER}.lora_" in bare:
        raise LoRAError(f"{where}: {name!r} belongs to target_parameters, which cannot be applied; plain LoRA is read.")
    for leaf, own in FACTORS.items():
        if bare == leaf or bare.endswith(f".{leaf}"):
            bare = bare.removesuffix(leaf) + own
            break
    return bare.replace(f"{BASE_LAYER}.", ".")


OUT_PROJ_COUNTS = 2

LAST_KNOWN_PEFT = (0, 21)


def as_plain(adapter: Adapter) -> Adapter:
    """The equal adapter without enable_lora, as PEFT applies it."""
    return _with_factors_b(adapter, lambda name, a, b, enabled: to_block_diagonal(b, enabled), 1 / OUT_PROJ_COUNTS)


def from_plain(adapter: Adapter) -> Adapter:
    """The inverse of as_plain.

    Raises:
        LoRAError: a B is not zero outside its blocks, so that enable_lora cannot express it.
    """
    return _with_factors_b(adapter, _gathered, OUT_PROJ_COUNTS)


def check_peft_version(version: object, where: object) -> None:
    """Refuse attention adapters of a later peft, which may add out_proj's change once.

    Raises:
        LoRAError: the version is later than those whose behaviour is known.
    """
    numbers = [int(part) if part.isdigit() else 0 for part in str(version or "0.0").split(".")[:2]]
    if tuple(numbers) > LAST_KNOWN_PEFT:
        raise LoRAError(
            f"{where}: adapts nn.MultiheadAttention and was written by peft {version}. peft up to 0.21 adds the change "
            "of out_proj twice; whether this one does is not known here. Update lightning_lora, or leave attention out."
        )


def _with_factors_b(adapter: Adapter, for_parts: Callable[..., torch.Tensor], for_output: float) -> Adapter:
    tensors = dict(adapter.tensors)
    for name in adapter.layers():
        enabled = adapter.config.enabled_parts(name) if adapter.config is not None else None
        key = f"{name}.{B}"
        if adapter.kinds.get(name) == ATTENTION_OUTPUT:
            tensors[key] = tensors[key].detach() * for_output
        elif enabled is not None:
            tensors[key] = for_parts(name, tensors[f"{name}.{A}"], tensors[key], enabled)
    return replace(adapter, tensors=tensors)


def _gathered(name: str, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    if a.shape[0] != b.shape[1] or b.shape[1] % sum(enabled) or b.shape[0] % len(enabled):
        raise LoRAError(
            f"adapter: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit enable_lora={list(enabled)}."
        )
    narrow = from_block_diagonal(b, enabled)
    if not torch.equal(to_block_diagonal(narrow, enabled), b):
        raise LoRAError(
            f"adapter: {name!r}: its B is not zero outside the blocks of enable_lora={list(enabled)}; something else "
            "changed it after it was saved."
        )
    return narrow
