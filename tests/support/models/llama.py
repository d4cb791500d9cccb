"""A small network with the layers of a Llama, adapted, for what ranks/scale.py says of costs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig, inject
from support.models.networks import randomise_
from support.ranks.scale import Llama

TINY = Llama("tiny", blocks=2, hidden=64, intermediate=96, keys=16, vocabulary=40)
RANK = 3
LINEAR = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """The layers of a Llama's block, in an order that needs no attention."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, sizes: Llama) -> None:
        super().__init__()
        for name, (out, into) in zip(LINEAR, sizes.linear(), strict=True):
            setattr(self, name, nn.Linear(into, out, bias=False))
        self.first, self.second = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + self.o(self.q(y)) + (self.k(y) * self.v(y)).mean(-1, keepdim=True)
        y = self.second(x)
        result: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Network(nn.Module):
    """A Llama without attention: same parameters, same traffic."""

    def __init__(self, sizes: Llama) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.blocks)))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.blocks(self.embed(tokens))))
        return result


def network(sizes: Llama, r: int = RANK) -> Network:
    """The network in bfloat16, with an adapter of rank r."""
    torch.manual_seed(0)
    model = Network(sizes).bfloat16()
    inject(model, LoRAConfig(r=r, lora_alpha=r, target_modules=LINEAR))
    randomise_(model, (0.01 / (3 * sizes.hidden * r) ** 0.5) ** 0.5)  # about 1 % of the weights' norm
    warnings.filterwarnings("ignore", "lightning_lora: merged 16-bit weights")  # what that costs is known
    return model


def stored(tensor: Any) -> int:
    """Bytes behind a rank's shard, the padding included."""
    return int(tensor.to_local().untyped_storage().nbytes())
