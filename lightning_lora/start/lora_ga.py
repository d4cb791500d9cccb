"""A and B that start from the gradients of the weights, the base left as it is (LoRA-GA, arXiv:2407.05000).

With G = U @ S @ V.T the gradient of a weight, A0 is V's first r directions and B0 U's next r, each times its singular
value and the stable scale out^(1/4) / sqrt(GAMMA): then the first step changes W' as full fine-tuning would. Their
product is subtracted again, W' = W + s * (B @ A - B0 @ A0), where PEFT takes it out of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.sharding import copy_, is_sharded
from ..errors import LoRAError
from ..names import B
from ..nn.adapted_weights import AdaptedWeights, active_as
from ..nn.low_rank import TRANSPOSED
from ..nn.random_stream import svd_lowrank
from ..progress import progress_bar
from .batches import Caller, evaluating, from_first_rank, in_step

GAMMA = 16.0  # the paper's
ITERATIONS, OVERSAMPLED, SEED = 4, 4, 42  # of the decomposition; the first two as in PEFT


def start_from_gradients(
    model: nn.Module,
    layers: Mapping[str, AdaptedWeights],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
    caller: Caller,
) -> None:
    """Let A and B, and what is subtracted, start from the mean gradient over all batches. In place.

    It takes a float32 copy of these layers' weights for the sum, and another while a batch is in backward.

    Raises:
        LoRAError: see initialize_from_data.
    """
    for name, layer in layers.items():
        if layer.quantised() or is_sharded(layer.main_weight()):
            what = "is quantised" if layer.quantised() else "is sharded"
            raise LoRAError(
                f"{caller.verb}: the weight of {name!r} {what}, and gradients of whole weights are needed; choose "
                "another init_lora_weights, or call initialize_from_data before the model is sharded."
            )
    weights = {name: layer.main_weight() for name, layer in layers.items()}
    with active_as(layers.values(), False):  # their products are zero so far
        gradients = _mean_gradients(model, weights, batches, forward, caller)
    starts = {}
    with progress_bar("decomposing", len(layers)) as advance:
        for name, layer in layers.items():
            gradient = gradients.pop(name)
            matrix = gradient.T if layer.kind() in TRANSPOSED else gradient
            starts[name] = tuple(map(from_first_rank, _factors(matrix, layer.lora.spec.r)))
            advance(1)
    for name, layer in layers.items():
        a, b = starts[name]
        for leaf, factor in layer.stored().items():
            copy_(factor, (b if layer.lora.spec.variant.placed_as[leaf] == B else a).to(factor))


def _mean_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
    caller: Caller,
) -> dict[str, torch.Tensor]:
    """Return the mean gradient of each weight over the batches of all ranks, in float32."""
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    with evaluating(model), _requiring_gradients(model, weights), torch.enable_grad():
        for batch in in_step(batches, lambda: False):
            _loss(forward(model, batch), caller).backward()  # type: ignore[no-untyped-call]
            count += 1
            for name, weight in weights.items():
                if weight.grad is None:
                    raise LoRAError(
                        f"{caller.verb}: no gradient reaches the weight of {name!r}; leave it out with "
                        f"exclude_modules, or let the loss of {caller.forward} depend on it."
                    )
                sums[name] += weight.grad
                weight.grad = None
    if not count:
        raise LoRAError(f"{caller.verb}: there are no batches.")
    for name, total in sums.items():
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        if not total.isfinite().all():
            raise LoRAError(f"{caller.verb}: the gradient of the weight of {name!r} holds NaN or Inf.")
        total /= count
    return sums


@contextmanager
def _requiring_gradients(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let these weights alone require gradients inside; outside all is as it was found, gradients included."""
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


def _loss(result: object, caller: Caller) -> torch.Tensor:
    """Return the loss in what a forward returned."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise LoRAError(
            f"{caller.verb}: to start from gradients, {caller.forward} must return the loss, or what holds it as "
            f"`loss`; found {type(result).__name__}."
        )
    return loss


def _factors(gradient: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 (rank, in) and B0 (out, rank) from a gradient (out, in); directions that there are not are zero."""
    left, values, right = svd_lowrank(gradient, min(OVERSAMPLED * rank, *gradient.shape), ITERATIONS, SEED)
    a, b = gradient.new_zeros(rank, gradient.shape[1]), gradient.new_zeros(gradient.shape[0], rank)
    first, second = right[:, :rank].T, (left * values)[:, rank : 2 * rank]
    a[: len(first)] = first
    b[:, : second.shape[1]] = second * (gradient.shape[0] ** 0.25 / GAMMA**0.5)
    return a, b
