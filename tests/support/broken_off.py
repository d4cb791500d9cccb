"""Exceptions at any point of a call, as the handlers of signals, debuggers and other threads raise them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lightning_lora

PACKAGE = str(Path(lightning_lora.__file__).parent)


class BrokenOff(BaseException):
    """What is raised."""


def _apart(call: Callable[[], object]) -> Iterator[None]:
    """Call within a generator, which has a state of exceptions of its own.

    Where an exception comes at the end of an `except`, Python goes on as if the handled one was handled for ever.
    """
    call()
    yield


def break_off(call: Callable[[], object], *lines: int) -> bool:
    """Call, and raise BrokenOff before the given lines of the package; the first line that runs has number 0.

    Such a line is also the end of a `with torch.no_grad()`, before it is left, where no signal's handler runs: so
    torch's modes are put back here.

    Returns:
        Whether it came to the last of them.
    """
    pending, seen = sorted(lines), 0
    tracer, profiler, grad = sys.gettrace(), sys.getprofile(), torch.is_grad_enabled()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen += 1
            if pending and seen > pending[0]:
                pending.pop(0)
                raise BrokenOff(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    def trace_on(*args: Any) -> None:
        """Trace anew what is called after an exception, which ends the tracing."""
        if pending and sys.gettrace() is None:
            sys.settrace(trace)

    sys.setprofile(trace_on)
    sys.settrace(trace)
    try:
        next(_apart(call))
    except BrokenOff:
        pass
    finally:
        reached = not pending
        pending.clear()
        sys.setprofile(profiler)
        sys.settrace(tracer)
        torch.set_grad_enabled(grad)
    return reached
