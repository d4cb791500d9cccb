"""Plain LoRA that equals an adapter of any variant: one A and one B a layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import defaults_of
from ..names import A, B
from ..nn.low_rank import to_block_diagonal
from .adapter import Adapter

Pair = tuple[torch.Tensor, torch.Tensor]  # left (m, r), right (r, n)


def as_lora(adapter: Adapter) -> Adapter:
    """Return the plain LoRA that equals an adapter, with the same scalings. What lies beside the factors stays.

    A and B of a layer are the factors that its tensors act as: start factors are stacked to twice the rank, and a
    product of products gets its square. Of a fused projection, the adapted parts have one block diagonal B. Ranks in
    the options stay as they were written.

    Args:
        adapter: of a variant without a scale.
    """
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        info, factors = adapter.layer_info(layer), adapter.effective_factors(layer)
        a, b, _ = info.shaped(factors) if info.shape else factors
        b = to_block_diagonal(b, info.enabled) if info.enabled else b
        for leaf in adapter.stored(layer):
            del tensors[adapter.factor_name(layer, leaf)]
        tensors[adapter.factor_name(layer, A)] = a.detach()
        tensors[adapter.factor_name(layer, B)] = b.detach()
    config = adapter.config
    if config is not None:
        config = replace(config, **defaults_of("variant", "variant's own", "start", "parts"))
    whole = {name: replace(layer, parts=None) for name, layer in adapter.layers.items()}
    return replace(adapter, tensors=tensors, config=config).with_layers(whole)


def padded(pair: Pair, rank: int) -> Pair:
    """Return a pair of a higher rank with the same product: zeros are added. Factors of convolutions keep kernels."""
    left, right = pair
    more = rank - left.shape[1]
    return (
        torch.cat([left, left.new_zeros(len(left), more, *left.shape[2:])], 1),
        torch.cat([right, right.new_zeros(more, *right.shape[1:])]),
    )
