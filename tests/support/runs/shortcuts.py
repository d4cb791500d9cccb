"""Leave out what no test looks at: work that libraries repeat at every call, and garbage collections."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch


def read_entry_points_once() -> None:
    """Cache the entry points of all packages, which every new Trainer reads. Call it before Lightning is imported."""
    setattr(importlib.metadata, "entry_points", functools.cache(importlib.metadata.entry_points))  # noqa: B010


def seed_without_stack_traces() -> None:
    """Keep `torch.manual_seed` from formatting a stack trace for each kind of device that is not in use."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if "traceback" in vars(device):
            vars(device)["traceback"] = SimpleNamespace(format_stack=list)


@contextmanager
def without_collections() -> Iterator[None]:
    """Collect garbage before, and none inside: what is freed then is no part of what is counted."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def let_collections_pass_over_what_is_there() -> None:
    """Exclude all present objects from later garbage collections: each would take half a second for them."""
    gc.collect()
    gc.freeze()
