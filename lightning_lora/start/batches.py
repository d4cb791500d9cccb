"""Batches that a model is run on before training: in step on all ranks, in eval mode, with the first rank's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_NOTHING = object()


def in_step(batches: Iterable[Any], finished: Callable[[], bool]) -> Iterator[Any]:
    """Yield batches until a rank has no more, or all have finished. Collective where there are several ranks."""
    remaining = iter(batches)
    while True:
        batch = next(remaining, _NOTHING)
        more, done = _on_all_ranks([batch is not _NOTHING, finished()])
        if done or not more:
            return
        yield batch


def _on_all_ranks(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether every rank has it."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(flags)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(flags))
    return [all(of_ranks) for of_ranks in zip(*gathered, strict=True)]


def from_first_rank(values: torch.Tensor | None) -> torch.Tensor:
    """Return the first rank's values, on every rank. Collective where there are several."""
    assert values is not None
    if dist.is_available() and dist.is_initialized():
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


@dataclass(frozen=True)
class Caller:
    """Who runs the model over batches, as messages call it.

    Attributes:
        verb: what a message begins with.
        forward: what runs the model.
        slow: what helps where components do not converge.
    """

    verb: str = "initialize_from_data"
    forward: str = "the forward"
    slow: str = "More batches, or a smaller tau, would do"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside; outside each module is in the mode in which it was found."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
