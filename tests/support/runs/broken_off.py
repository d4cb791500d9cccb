"""Raise exceptions at any point of a call, as handlers of signals, debuggers and other threads do."""

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
    """The exception that is raised."""


def _apart(call: Callable[[], object]) -> Iterator[None]:
    """Call within a generator, which has a state of handled exceptions of its own.

    When an exception comes at the end of an `except`, Python goes on as if the first exception was still being handled.
    """
    call()
    yield


def break_off(call: Callable[[], object], *lines: int, also: tuple[str, ...] = ()) -> bool:
    """Call, and raise BrokenOff before the given lines of the package. The first line that runs has number 0.

    The lines of the files in `also` are counted too.

    One of the lines may be the end of a `with torch.no_grad()`, before it is left. No signal's handler runs there, but
    here an exception does, so torch's modes are restored.

    Returns:
        Whether the call came to the last of the lines.
    """
    pending, seen = sorted(lines), 0
    tracer, profiler, grad = sys.gettrace(), sys.getprofile(), torch.is_grad_enabled()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith((PACKAGE, *also)):
            return None
        if event == "line":
            seen += 1
            if pending and seen > pending[0]:
                pending.pop(0)
                raise BrokenOff(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    def trace_on(*args: Any) -> None:
        """Start tracing again: an exception ends it."""
        if pending and sys.gettrace() is None:
            sys.settrace(trace)

    if len(lines) > 1:
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
