"""LoRA (arXiv:2106.09685): W' = W + s * B @ A."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from ..names import A, B
from .low_rank import EMBEDDING, GROUPED_CONV
from .random_stream import stream
from .variant import EffectiveFactors, LayerInfo, Stored, Variant, Weight

EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"  # PEFT's names
PEFT_LEAVES = {"lora_A.weight": A, "lora_B.weight": B, EMBEDDING_A: A, EMBEDDING_B: B}
WITHOUT_ZERO = (False, "orthogonal")  # values of init_lora_weights for which neither factor starts as zero

Shape = tuple[int, ...]


class LoRA(Variant):
    """The adapter is two factors A and B, and s * B @ A is added to the weight. One factor starts as zero."""

    name, title = "lora", "LoRA"
    trained: ClassVar[tuple[str, ...]] = (A, B)
    peft_type = "LORA"
    peft_leaves: ClassVar[Mapping[str, str]] = PEFT_LEAVES
    split_like: ClassVar[Mapping[str, str]] = {A: A, B: B}

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return dict(zip((A, B), info.factor_shapes(), strict=True))

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        a, b = initial_factors(*info.factor_shapes(), info.init, info.seed, lookup=info.is_lookup)
        return {A: a, B: b}

    def is_initial(self, stored: Stored, info: LayerInfo) -> bool:
        if info.init in WITHOUT_ZERO:
            return False
        factor = stored[A if info.is_lookup else B].detach()
        return factor.numel() > 0 and not factor.is_meta and not bool(factor.any())

    def effective_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        return EffectiveFactors(stored[A], stored[B])

    def rank(self, stored: Stored) -> int:
        return stored[B].shape[1]

    def why_not_in_peft(self, kind: str) -> str:
        if kind == GROUPED_CONV:
            return "is a convolution with groups; PEFT's adapter for those mixes the groups and means another thing"
        return super().why_not_in_peft(kind)

    def peft_leaf(self, leaf: str, kind: str) -> str:
        embedding = {A: EMBEDDING_A, B: EMBEDDING_B} if kind == EMBEDDING else {}
        return embedding.get(leaf) or super().peft_leaf(leaf, kind)

    @property
    def option(self) -> str:
        return "LoRA"


def initial_factors(
    shape_a: Shape, shape_b: Shape, init: bool | str, seed: int, *, lookup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw A and B in float32 on the CPU from a new generator, so that every device and rank gets the same numbers.

    Args:
        shape_a: shape of A.
        shape_b: shape of B, with the rank as dimension 1.
        init: LoRAConfig's init_lora_weights.
        seed: of the generator.
        lookup: whether A is a table from which rows are looked up (embeddings). Then B is drawn and A is zero.
    """
    generator = stream(seed)
    a, b = (torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in (shape_a, shape_b))
    if lookup and init is not False and init != "orthogonal":
        b.normal_(generator=generator)
    elif init == "orthogonal":
        # From even and odd rows of one orthogonal matrix, so that B @ A is zero (PEFT's "orthogonal").
        r = shape_b[1]
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        rows = torch.linalg.qr(draw(r, r))[0]
        a = draw(math.prod(shape_a) // r, r // 2).mm(rows[0::2]).T / 10
        a = a.view(r, shape_a[0] // r, -1).transpose(0, 1).reshape(shape_a)
        b = (draw(shape_b[0], r // 2).mm(rows[1::2]) / 10).reshape(shape_b)
    elif init == "gaussian":
        a.normal_(std=1 / shape_b[1], generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
    return a, b
