"""Initial values of A and B."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from .random_stream import stream

WITHOUT_ZERO = (False, "orthogonal")  # values of init_lora_weights with which neither factor starts as zero

Shape = tuple[int, ...]


def initial_factors(
    shape_a: Shape, shape_b: Shape, init: bool | str, seed: int, *, lookup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw A and B in float32 on the CPU, by a new generator: every device and rank gets the same numbers.

    Args:
        shape_a, shape_b: shapes with the rank as B's dimension 1.
        init: LoRAConfig's init_lora_weights.
        seed: of the generator.
        lookup: whether A is a table that rows are taken from (embeddings), so that B is drawn and A is zero.
    """
    generator = stream(seed)
    a, b = (torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in (shape_a, shape_b))
    if lookup and init is not False and init != "orthogonal":
        b.normal_(generator=generator)
    elif init == "orthogonal":
        a, b = _orthogonal(shape_a, shape_b, generator)
    elif init == "gaussian":
        a.normal_(std=1 / shape_b[1], generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
    return a, b


def _orthogonal(shape_a: Shape, shape_b: Shape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B from the odd and even rows of one orthogonal matrix, so that B @ A is zero (PEFT's "orthogonal")."""
    r = shape_b[1]
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    rows = torch.linalg.qr(draw(r, r))[0]
    a = draw(math.prod(shape_a) // r, r // 2).mm(rows[0::2]).T / 10
    b = draw(shape_b[0], r // 2).mm(rows[1::2]) / 10
    return a.view(r, shape_a[0] // r, -1).transpose(0, 1).reshape(shape_a), b.reshape(shape_b)
