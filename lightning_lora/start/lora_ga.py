"""LoRA-GA: A and B start from the gradient of the weight (arXiv:2407.05000).

Let G = U @ S @ V.T be the gradient of a weight W. A0 holds the first r columns of V. B0 holds the next r columns of U,
each times its singular value and the scale out^(1/4) / sqrt(GAMMA). Then the first step changes W' as full fine-tuning
would. W itself stays as it is, W' = W + s * (B @ A - B0 @ A0), where PEFT subtracts the product from W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.sharding import copy_, is_spread
from ..errors import LoRAError
from ..names import B
from ..nn.adapted_weights import AdaptedWeights, active_as
from ..nn.low_rank import matrix_view
from ..nn.random_stream import svd_lowrank
from ..progress import progress_bar
from .batches import Forward, check_finite, data_batches, from_first_rank

GAMMA = 16.0  # the paper's
ITERATIONS, OVERSAMPLED, SEED = 4, 4, 42  # of the decomposition; iterations and oversampling as in PEFT


def start_from_gradients(
    model: nn.Module, layers: Mapping[str, AdaptedWeights], batches: Iterable[Any], forward: Forward, n: int
) -> None:
    """Let A, B, A0 and B0 of each layer start from the mean gradient over the first n batches. In place.

    The sum of gradients takes a float32 copy of the layers' weights, and the backward of a batch another copy.
    Collective, as initialize_from_data.

    Raises:
        LoRAError: there are no batches, a weight is quantized or sharded or gets no gradient, or a gradient is not
            finite.
    """
    for name, layer in layers.items():
        if layer.quantized() or is_spread(layer.adapted_weight()):
            raise LoRAError(
                f"initialize_from_data: the weight of {name!r} is {'quantized' if layer.quantized() else 'sharded'}, "
                "but this start needs gradients of whole weights; choose another init_lora_weights, or call "
                "initialize_from_data before the model is sharded."
            )
    weights = {name: layer.adapted_weight() for name, layer in layers.items()}
    with active_as(layers.values(), False):  # their products are zero so far
        gradients = _mean_gradients(model, weights, batches, forward, n)
    with progress_bar("decomposing", len(layers)) as advance:
        for name, layer in layers.items():
            gradient = matrix_view(layer.kind(), gradients.pop(name))
            a, b = map(from_first_rank, _factors(gradient, layer.lora.spec.r))
            for leaf, factor in layer.stored().items():
                copy_(factor, (b if layer.lora.spec.variant.split_like[leaf] == B else a).to(factor))
            advance(1)


def _mean_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Any], forward: Forward, n: int
) -> dict[str, torch.Tensor]:
    """Return the mean gradient of each weight over the batches of all ranks, float32 and of the weight's shape."""
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    with data_batches(model, batches, n) as ready, _requiring_gradients(model, weights), torch.enable_grad():
        for batch in ready:
            result: Any = forward(model, batch)
            (result["loss"] if isinstance(result, Mapping) else getattr(result, "loss", result)).backward()
            count += 1
            for name, weight in weights.items():
                if weight.grad is None:
                    raise LoRAError(
                        f"initialize_from_data: no gradient reaches the weight of {name!r}; leave it out with "
                        "exclude_modules, or let the loss depend on it."
                    )
                sums[name] += weight.grad
                weight.grad = None
    for name, total in sums.items():
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        total /= count
        check_finite(total, f"the gradients of the weight of {name!r}")
    return sums


@contextmanager
def _requiring_gradients(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let these weights alone require gradients inside; afterwards requires_grad and all gradients are restored."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(weight) for weight in weights.values()}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _factors(gradient: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 (rank, in) and B0 (out, rank) from a gradient (out, in).

    Rows of A0 and columns of B0 beyond the number of singular values are zero.
    """
    left, values, right = svd_lowrank(gradient, min(OVERSAMPLED * rank, *gradient.shape), ITERATIONS, SEED)
    a, b = gradient.new_zeros(rank, gradient.shape[1]), gradient.new_zeros(gradient.shape[0], rank)
    first, second = right[:, :rank].T, (left * values)[:, rank : 2 * rank]
    a[: len(first)] = first
    b[:, : second.shape[1]] = second * (gradient.shape[0] ** 0.25 / GAMMA**0.5)
    return a, b
