"""Adapters that start from the weight, from and to the plain ones of twice the rank that equal them.

B @ A - B0 @ A0 is [B, -B0] @ [A; A0], in each part of a fused projection and each expert of a stack: as peft itself
converts such adapters, so that they fit the base as it was. s stays, so lora_alpha grows with the rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import START_A, START_B, A, B
from ..nn.low_rank import halve_ranks, stack_ranks
from .adapter import Adapter


def without_starts(adapter: Adapter) -> Adapter:
    """Return the equal adapter of twice the rank without start factors; one that has none as it is."""
    if adapter.config is None or not adapter.config.has_start:
        return adapter
    tensors = dict(adapter.tensors)
    for layer in adapter.layers():
        a, b, start_a, start_b = (tensors.pop(adapter.factor_name(layer, f)).detach() for f in (A, B, START_A, START_B))
        wide = stack_ranks(a, b, start_a, -start_b)
        tensors |= dict(zip((adapter.factor_name(layer, factor) for factor in (A, B)), wide, strict=True))
    return replace(adapter, tensors=tensors, config=doubled(adapter.config))


def with_starts(adapter: Adapter, config: LoRAConfig | None) -> Adapter:
    """Undo without_starts, for the options from before.

    Raises:
        LoRAError: a layer's rank is odd; something changed it since.
    """
    if config is None or not config.has_start:
        return adapter
    tensors = dict(adapter.tensors)
    for layer in adapter.layers():
        a, b = adapter.factor(layer, A), adapter.factor(layer, B)
        if b.shape[1] % 2 or a.shape[0] % b.shape[1]:
            raise LoRAError(
                f"adapter: {layer!r}: A {tuple(a.shape)} and B {tuple(b.shape)} should have twice the rank of "
                f"init_lora_weights={config.init_lora_weights!r}; something changed them after they were saved."
            )
        (a, b), (start_a, negative_b) = halve_ranks(a, b)
        values = {A: a, B: b, START_A: start_a, START_B: -negative_b}
        tensors |= {adapter.factor_name(layer, factor): value for factor, value in values.items()}
    return replace(adapter, tensors=tensors, config=config)


def doubled(config: LoRAConfig) -> LoRAConfig:
    """Return the options of the plain adapter that equals one with start factors; of any other, as they are."""
    if not config.has_start:
        return config
    growth = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={key: growth * alpha for key, alpha in (config.alpha_pattern or {}).items()},
        init_lora_weights=True,
    )
