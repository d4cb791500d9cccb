"""Show the summary and single lines to the user, on a terminal or in Lightning's log."""

from __future__ import annotations

import sys
from logging import INFO, NOTSET, Logger, StreamHandler, getLogger
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from rich.console import Console

RANK_ZERO = "lightning_utilities.core.rank_zero"  # holds Lightning's logger and the rank of this process


def show(shown: object) -> None:
    """Show a summary or a line, on rank zero.

    On a terminal or in a notebook rich prints it, if rich is installed. Elsewhere it goes to Lightning's log. Where
    Lightning's log is silenced, where the program has not imported Lightning, and on other ranks, it goes to the logger
    `lightning_lora`.
    """
    if _rank() > 0:
        getLogger(__name__).info(str(shown))  # a program that wants other ranks' lines enables this logger
        return
    loggers, console = _loggers(), terminal()
    log = next((each for each in loggers if each.isEnabledFor(INFO)), loggers[0])
    if console is None:
        log.info(str(shown))
    elif log.isEnabledFor(INFO):
        console.print(shown, markup=False, highlight=False)


def tell(message: str) -> None:
    """Show a line to the user, in the same place as the summary."""
    show(message)


def terminal() -> Console | None:
    """Return rich's console where rich is installed and a person looks at the standard output, else None."""
    try:
        from rich import get_console
    except ImportError:
        return None
    console = get_console()
    return console if console.is_terminal or console.is_jupyter else None


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank_zero_only = getattr(sys.modules.get(RANK_ZERO), "rank_zero_only", None)
    return getattr(rank_zero_only, "rank", None) or 0


def _loggers() -> list[Logger]:
    """Return Lightning's logger, where the program has imported it, and this package's own."""
    own, lightnings = getLogger(__name__), getattr(sys.modules.get(RANK_ZERO), "log", None)
    if isinstance(lightnings, Logger) and lightnings.name != RANK_ZERO:
        return [lightnings, own]
    levels = {own.level, getLogger(__package__).level}
    if levels == {NOTSET} and not own.hasHandlers():  # nobody set up logging: show lines, as Lightning does
        own.setLevel(INFO)
        own.addHandler(StreamHandler())
        own.propagate = False
    return [own]
