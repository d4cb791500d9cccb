"""Run a model over batches before its training: in eval mode, all ranks in step, with results that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LoRAError
from ..progress import progress_bar

COUNT = 16  # of the batches that are used
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


@contextmanager
def data_batches(model: nn.Module, batches: Iterable[Any], n: int) -> Iterator[Iterator[Any]]:
    """Put a model into eval mode inside, and give the first n batches; each module has its earlier mode afterwards.

    Collective where there are several ranks: the batches end on all of them where one rank has no more.

    Raises:
        LoRAError: there are no batches.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with progress_bar("initialising", n, "batches") as advance:
            yield _in_step(islice(batches, n), advance)
    finally:
        for module in training:
            module.training = True


def _in_step(batches: Iterator[Any], advance: Callable[[int], object]) -> Iterator[Any]:
    count = 0
    while _on_all_ranks((batch := next(batches, _NOTHING)) is not _NOTHING):
        yield batch
        advance(1)
        count += 1
    if not count:
        raise LoRAError("initialize_from_data: there are no batches; give at least one.")


def _on_all_ranks(flag: bool) -> bool:
    """Return whether a flag is true on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, flag)
    return all(gathered)


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise LoRAError where a value is NaN or Inf."""
    if not values.isfinite().all():
        raise LoRAError(f"initialize_from_data: {what} hold NaN or Inf; leave such batches out.")


def from_first_rank(values: torch.Tensor) -> torch.Tensor:
    """Return the first rank's values on every rank. Collective where there are several ranks."""
    if dist.is_available() and dist.is_initialized():
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values
