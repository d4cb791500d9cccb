"""Lines for the user, such as the summary: they go to the logger `lightning_lora`, on rank zero."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from logging import INFO, NOTSET, StreamHandler, getLogger
from pathlib import Path

import torch.distributed as dist

INSIDE = (
    f"{Path(__file__).parent}{os.sep}",
    contextlib.__file__,
)  # the files of this package, and of its `with` blocks
RANK_ZERO = "lightning_utilities.core.rank_zero"  # where Lightning is imported, it knows the rank of this process


def tell(message: object) -> None:
    """Log a line or a summary, on rank zero. Where nobody has set up logging it is shown, as Lightning's lines are."""
    log = getLogger(__package__)
    if log.level == NOTSET and not log.hasHandlers():
        log.setLevel(INFO)
        log.addHandler(StreamHandler())
        log.propagate = False
    if process_rank() == 0:
        log.info(str(message))


def warn(message: str) -> None:
    """Warn at the line outside of this package that called it, however deep inside the warning comes up."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def process_rank() -> int:
    """Return the number of this process, as torch.distributed or else Lightning knows it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank_zero_only = getattr(sys.modules.get(RANK_ZERO), "rank_zero_only", None)
    return getattr(rank_zero_only, "rank", None) or 0
