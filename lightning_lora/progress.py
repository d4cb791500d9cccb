"""A progress bar on a terminal, for work that takes more than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from .notices import process_rank

DELAY = 1.0  # seconds until a bar is shown, so that short work shows none


Unit = Literal["batches", "bytes", "layers", "tensors"]


@contextmanager
def progress_bar(what: str, total: int, unit: Unit = "layers") -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal, on rank zero, for work that takes more than a second.

    Args:
        what: the work, such as "merging".
        total: how much there is to do.
        unit: of the total.

    Returns:
        A context manager. Its value is a function to call with the size of each part that is done.
    """
    if process_rank() > 0 or not sys.stderr.isatty():  # a bar that is not shown takes as long as merging a small layer
        yield lambda size: None
        return
    scaled = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
    with tqdm(total=total, desc=what, delay=DELAY, leave=False, **scaled) as bar:
        yield bar.update
