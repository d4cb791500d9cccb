"""Products that the user's settings do not round: autocast rounds to 16 bits, other settings to 19 (TF32)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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


_PRECISION = threading.RLock()  # torch's setting counts for all threads


@contextmanager
def in_full_float32(device: str) -> Iterator[None]:
    """Compute products of float32 in float32 on a type of device, such as "cuda": no autocast, no TF32.

    Other threads that want this wait meanwhile. Do not communicate with other ranks inside.
    """
    with _PRECISION, without_autocast(device):
        everywhere, cuda = before = _precision()
        try:
            _set_precision_(everywhere and "highest", cuda and "ieee")
            yield
        finally:
            _set_precision_(*before)


def _precision() -> tuple[str | None, str | None]:
    """Return torch's settings for products of float32: for all devices, and for CUDA alone (torch 2.9 and newer)."""
    everywhere = None
    with suppress(RuntimeError):  # some versions of torch refuse to tell where both settings were used
        everywhere = torch.get_float32_matmul_precision()
    return everywhere, getattr(torch.backends.cuda.matmul, "fp32_precision", None)


def _set_precision_(everywhere: str | None, cuda: str | None) -> None:
    """Change the settings that are not None and differ from the present ones. In place."""
    if everywhere is not None and _precision()[0] != everywhere:
        torch.set_float32_matmul_precision(everywhere)  # changes the setting for CUDA too
    now = _precision()[1]
    if cuda is not None and now != cuda and {now, cuda} != {"none", "ieee"}:  # which mean the same
        torch.backends.cuda.matmul.fp32_precision = cuda
