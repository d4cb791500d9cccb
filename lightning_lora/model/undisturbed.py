"""Steps that write into the weights, and that no exception leaves half done, wherever it comes from.

Python runs a signal's handler between any two of its instructions, and what the handler raises comes out there: Ctrl-C,
a timeout by SIGALRM. Here every such handler waits until the step is done. Exceptions that come in other ways (from a
debugger, or from another thread by PyThreadState_SetAsyncExc) find a step that can be undone or completed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import LoRAError
from ..nn.writer import Turn

# Those that programs handle; another one that is handled breaks a step off, which is then undone or completed.
NAMES = (
    "SIGINT SIGTERM SIGHUP SIGQUIT SIGALRM SIGVTALRM SIGPROF SIGUSR1 SIGUSR2 SIGCHLD SIGCONT SIGTSTP SIGWINCH SIGURG "
    "SIGIO SIGXCPU SIGBREAK"
)
SIGNALS = [number for number in signal.Signals if number.name in NAMES.split()]
ATTEMPTS = 4  # at bringing the weights back, each of them broken off by another exception


def run_undisturbed(step: Callable[[], None], restore: Callable[[], None], verb: str) -> None:
    """Run a step; where it raises, run what restores the weights, and raise that exception. Signals wait meanwhile.

    Args:
        step: what writes.
        restore: can be called after any part of the step, or of itself, and completes what is left to do.
        verb: what messages begin with.

    Raises:
        LoRAError: `restore` was broken off again and again.
    """
    signals, work = _Signals(), _Work(step, restore, verb)
    try:
        try:
            signals.hold()
            work.do()
        finally:
            work.undo_unless_done()
            signals.release()
    finally:  # an exception may come before the first of these begins, too
        work.undo_unless_done()
        signals.release()


class Ending:
    """The end of a `with` block that brings a model back, called twice: an exception may come before the first begins.

    Args:
        turn: of the block, which may end in another thread than it began in.
        step: what brings the model back; can be called again after any part of itself.
    """

    def __init__(self, turn: Turn, step: Callable[[], None]) -> None:
        self.turn, self.step, self.is_done = turn, step, False

    def __call__(self) -> None:
        """Bring the model back, unless that is done.

        Raises:
            LoRAError: another thread is changing the model, or what the step raises. It is not tried again.
        """
        if self.is_done:
            return
        try:
            self.turn.go_on()
            run_undisturbed(self.step, self.step, self.turn.verb)
            self.is_done = True
        except LoRAError:
            self.is_done = True
            raise


class _Work:
    """A step and what undoes it; both leave nothing half done, so that each is done once."""

    def __init__(self, step: Callable[[], None], restore: Callable[[], None], verb: str) -> None:
        self.step, self.restore, self.verb, self.is_done = step, restore, verb, False

    def do(self) -> None:
        try:
            self.step()
            self.is_done = True
        except LoRAError:
            self.is_done = self.step is self.restore  # which raises it when it has done all it can
            raise

    def undo_unless_done(self) -> None:
        for _ in range(ATTEMPTS):
            if self.is_done:
                return
            try:
                self.restore()
                self.is_done = True
            except LoRAError:
                self.is_done = True
                raise
            except BaseException:  # the first exception is raised when the weights are back
                continue
        if not self.is_done:
            self.is_done = True
            raise LoRAError(
                f"{self.verb}: exceptions broke off each of {ATTEMPTS} attempts at bringing the weights back, so that "
                "some hold neither W nor W'. Call unmerge(model) before anything else; it goes on where they stopped."
            )


class _Signals:
    """Holds the Python handlers of signals back, and runs them afterwards for those that came."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}  # that are to be put back
        self.frames: dict[int, FrameType | None] = {}  # by signal that came: where it came
        self.due: list[tuple[int, Any]] = []  # signals that came, with their handlers

    def hold(self) -> None:
        """Note signals from now on; only the main thread ever runs handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        if getattr(signal.getsignal(signal.SIGINT), "__func__", None) is _Signals._note:
            return  # a step around this one holds them
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) or (number == signal.SIGINT and handler is not None):
                self.handlers[number] = handler
                signal.signal(number, self._note)

    def release(self) -> None:
        """Put every handler back, whatever exception comes, and run the handlers of the signals that came."""
        try:
            while self.handlers:
                number, handler = next(iter(self.handlers.items()))
                signal.signal(number, handler)
                if number in self.frames:
                    self.due.append((number, handler))
                del self.handlers[number]
        except BaseException:
            self.release()
            raise
        self._run_due()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.frames[number] = frame

    def _run_due(self) -> None:
        if not self.due:
            return
        number, handler = self.due.pop(0)
        try:
            if callable(handler):
                handler(number, self.frames[number])  # a signal that is raised anew would reach an event loop twice
            else:
                signal.raise_signal(number)
        finally:
            self._run_due()
