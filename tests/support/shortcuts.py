"""Save time: work that libraries repeat at every call, and no test looks at, is done once or left out."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
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


def let_collections_pass_over_what_is_there() -> None:
    """Exclude all present objects from later garbage collections: each would take half a second for them."""
    gc.collect()
    gc.freeze()
