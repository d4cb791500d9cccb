"""Options that give each layer a given rank and scaling."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import mode
from typing import Any

from ..config import LoRAConfig
from ..matching import exact_key


def options_hold(config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> bool:
    """Tell whether options give the layers in `ranks` these ranks and scalings."""
    return all(config.rank(n) == r and math.isclose(config.scaling(n), scalings[n]) for n, r in ranks.items())


def exact_options(
    config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float], parameters: Collection[str] = ()
) -> LoRAConfig:
    """Change options so that they adapt the layers and parameters in `ranks` alone, with these ranks and scalings.

    r and lora_alpha are those of most layers. Patterns name the other layers.
    """
    return replace(
        with_exact_ranks(config, ranks, scalings),
        target_modules=[name for name in ranks if name not in parameters],
        target_parameters=list(parameters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def with_exact_ranks(config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> LoRAConfig:
    """Change options so that the layers in `ranks` have these ranks and scalings. They choose the same layers."""
    alphas = {n: scalings[n] * (math.sqrt(r) if config.use_rslora else r) for n, r in ranks.items()}
    alphas = {n: int(alpha) if alpha == int(alpha) else alpha for n, alpha in alphas.items()}
    common_r, common_alpha = mode(ranks.values()), mode(alphas.values())
    return replace(
        config,
        r=common_r,
        lora_alpha=common_alpha,
        rank_pattern={exact_key(n): r for n, r in ranks.items() if r != common_r},
        alpha_pattern={exact_key(n): alpha for n, alpha in alphas.items() if alpha != common_alpha},
    )


def with_aliases(config: LoRAConfig, aliases: Mapping[str, str]) -> LoRAConfig:
    """Change options so that they mean the same for every name of a layer.

    A layer in a model under several names is adapted under its first one.

    Args:
        config: the options.
        aliases: the first name of a layer, by each of its other names.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parts: dict[str, Sequence[bool]] = {}
    for alias, first in aliases.items():
        key = exact_key(alias)
        if config.rank(alias) != config.rank(first):
            ranks[key] = config.rank(first)
        if config.alpha(alias) != config.alpha(first):
            alphas[key] = config.alpha(first)
        if config.enabled_parts(alias) != config.enabled_parts(first):
            parts[alias] = config.enabled_parts(first) or (True,)
    return replace(
        config,
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
        enable_lora={**parts, **(config.enable_lora or {})},
    )


def without_aliases(config: LoRAConfig, aliases: Collection[str]) -> LoRAConfig:
    """Undo with_aliases: a model takes options under the first name of a layer alone."""
    keys = {*aliases, *map(exact_key, aliases)}

    def kept(option: Mapping[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in (option or {}).items() if key not in keys}

    return replace(
        config,
        rank_pattern=kept(config.rank_pattern),
        alpha_pattern=kept(config.alpha_pattern),
        enable_lora=kept(config.enable_lora),
    )
