"""Products that autocast does not round to 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context manager that switches autocast off for a type of device, such as "cpu".

    Example::

        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if device == "meta":  # autocast does not know it
        return nullcontext()
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # switching autocast off takes as long as a small operation
