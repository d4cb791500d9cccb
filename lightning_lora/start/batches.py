"""Run a model over batches before its training: all ranks in step, in eval mode, with results that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

TAU = 0.99  # as in PEFT
IGNORED = -100  # the label that transformers gives tokens without a loss
_NOTHING = object()

Forward = Callable[[nn.Module, Any], object]
Mask = Callable[[Any], torch.Tensor | None]


def call_with(model: nn.Module, batch: Any) -> object:
    """Call the model with a batch: a mapping as keywords, a list or tuple as arguments, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def learned_tokens(batch: Any) -> torch.Tensor | None:
    """Return which tokens of a batch have attention and a label, as bool (batch, tokens); None means all."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    mask: torch.Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return mask & (batch["labels"] != IGNORED) if "labels" in batch else mask


@dataclass(frozen=True)
class Caller:
    """Words for messages of a run over batches.

    Attributes:
        verb: the beginning of each message, such as the function that the user called.
        forward: the user's function that runs the model.
        slow: advice for components that have not converged.
    """

    verb: str = "initialize_from_data"
    forward: str = "the forward"
    slow: str = "More batches, or a smaller tau, would do"


@dataclass(frozen=True)
class Run:
    """Batches, and how a model is run on them.

    Attributes:
        batches: what `forward` takes, one after the other.
        forward: runs the model on one batch.
        mask: returns which tokens of a batch count, as bool (batch, tokens), or None for all.
        tau: cosine similarity to its value one batch earlier from which on a component has converged.
        caller: words for messages.
    """

    batches: Iterable[Any]
    forward: Forward
    mask: Mask = learned_tokens
    tau: float = TAU
    caller: Caller = Caller()


def in_step(batches: Iterable[Any], finished: Callable[[], bool]) -> Iterator[Any]:
    """Yield batches until one rank has no more or all ranks have finished. Collective where there are several ranks."""
    remaining = iter(batches)
    while True:
        batch = next(remaining, _NOTHING)
        more, done = _on_all_ranks([batch is not _NOTHING, finished()])
        if done or not more:
            return
        yield batch


def _on_all_ranks(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is true on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(flags)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(flags))
    return [all(of_ranks) for of_ranks in zip(*gathered, strict=True)]


def from_first_rank(values: torch.Tensor | None) -> torch.Tensor:
    """Return the first rank's values on every rank. Collective where there are several ranks."""
    assert values is not None
    if dist.is_available() and dist.is_initialized():
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside; each module has its earlier mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
