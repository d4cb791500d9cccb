"""A progress bar on a terminal, for work that takes more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY = 1.0  # seconds until a bar is shown, so that short work shows none

Unit = Literal["bytes", "layers", "tensors"]


@contextmanager
def progress_bar(what: str, total: int, unit: Unit = "layers") -> Iterator[Callable[[int], None]]:
    """Show a bar for work that takes more than a second. The bar goes when the work ends.

    rich draws the bar on the standard error, if that is a terminal and rich is installed. Of several processes only the
    first one shows a bar.

    Args:
        what: the work, such as "merging".
        total: how much there is to do.
        unit: of the total.

    Returns:
        A context manager. Its value is a function to call with the size of each part that is done.
    """
    bar: Progress | None = None
    done, begun, drawn = 0, time.monotonic(), _is_watched()

    def advance(size: int) -> None:
        nonlocal bar, done
        done += size
        if not drawn or time.monotonic() - begun < DELAY:
            return
        if bar is None:
            bar = _start(what, total, unit)
        bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _is_watched() -> bool:
    """Tell whether a person looks at the standard error of this process, and rich can draw there."""
    if not sys.stderr.isatty() or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def _start(what: str, total: int, unit: Unit) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counts = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    text = TextColumn("{task.description}")
    bar = Progress(text, BarColumn(), *counts, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total)
    bar.start()
    return bar
