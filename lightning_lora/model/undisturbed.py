"""Run steps that write into the weights so that no exception leaves them half done.

Python runs a signal's handler between any two instructions, so that Ctrl-C or a timeout by SIGALRM can raise anywhere.
While a step runs, such handlers wait until it is done. Other exceptions can come from a debugger, or from another
thread by PyThreadState_SetAsyncExc. After one of these the step is undone or completed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import LoRAError
from ..nn.writer import Turn

# Signals that programs commonly handle. The handler of another signal may break a step off, which is then undone.
NAMES = (
    "SIGINT SIGTERM SIGHUP SIGQUIT SIGALRM SIGVTALRM SIGPROF SIGUSR1 SIGUSR2 SIGCHLD SIGCONT SIGTSTP SIGWINCH SIGURG "
    "SIGIO SIGXCPU SIGBREAK"
)
SIGNALS = [number for number in signal.Signals if number.name in NAMES.split()]
ATTEMPTS = 4  # at restoring the weights, where an exception breaks off each attempt


def run_undisturbed(step: Callable[[], None], restore: Callable[[], None], verb: str) -> None:
    """Run a step; where it raises, restore the weights and raise its exception. Signals wait meanwhile.

    Args:
        step: writes into the weights.
        restore: restores the weights. It can be called after any part of the step or of itself, and completes the work.
        verb: the beginning of messages.

    Raises:
        LoRAError: exceptions broke off each attempt to restore.
    """
    signals, work = _Signals(), _Work(step, restore, verb)
    try:
        try:
            signals.hold()
            work.do()
        finally:
            work.undo_unless_done()
            signals.release()
    finally:  # an exception may come before the inner finally begins
        work.undo_unless_done()
        signals.release()


class Ending:
    """The end of a `with` block, which restores the model.

    Call it in two nested `finally` clauses, because an exception may come before the inner clause begins.

    Args:
        turn: of the block, which may end in another thread than it began in.
        step: restores the model. It can be called again after any part of itself.
    """

    def __init__(self, turn: Turn, step: Callable[[], None]) -> None:
        self.turn, self.step, self.is_done = turn, step, False

    def __call__(self) -> None:
        """Restore the model, unless that was done.

        Raises:
            LoRAError: another thread is changing the model, or the step raised it. Later calls do nothing.
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
    """A step and the function that undoes it; at most one of them is completed."""

    def __init__(self, step: Callable[[], None], restore: Callable[[], None], verb: str) -> None:
        self.step, self.restore, self.verb, self.is_done = step, restore, verb, False

    def do(self) -> None:
        try:
            self.step()
            self.is_done = True
        except LoRAError:
            self.is_done = self.step is self.restore  # restoring raises LoRAError after it has done all it can
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
            except BaseException:  # the first exception is raised after the weights are restored
                continue
        if not self.is_done:
            self.is_done = True
            raise LoRAError(
                f"{self.verb}: exceptions broke off each of {ATTEMPTS} attempts at bringing the weights back, so that "
                "some hold neither W nor W'. Call unmerge(model) before anything else; it completes the work."
            )


class _Signals:
    """Hold the Python handlers of signals back, and run them afterwards for the signals that came."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}  # the program's handlers, by signal
        self.frames: dict[int, FrameType | None] = {}  # where the program was when a signal came, by signal
        self.due: list[tuple[int, Any]] = []  # signals that came, with the program's handlers

    def hold(self) -> None:
        """Only note signals from now on. Does nothing outside of the main thread, which alone runs handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        found = {number: signal.getsignal(number) for number in SIGNALS}  # each takes as long as a small operation
        if getattr(found[signal.SIGINT], "__func__", None) is _Signals._note:
            return  # an outer step holds them already
        for number, handler in found.items():
            if callable(handler) or (number == signal.SIGINT and handler is not None):
                self.handlers[number] = handler
                signal.signal(number, self._note)

    def release(self) -> None:
        """Put every handler back, even if exceptions come, and run the handlers of the signals that came."""
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
                handler(number, self.frames[number])  # raising the signal again would reach an event loop twice
            else:
                signal.raise_signal(number)
        finally:
            self._run_due()
