"""One writer at a time: only one thread may change an injected model.

Each call that changes a model takes a turn. A call with a body, such as `with merged(model)`, keeps its turn until the
body has ended, because the end of the block writes too. Turns of one thread nest. A call from another thread is refused
at once. Nobody waits for a turn, so there is no deadlock.

A turn is no lock of the operating system. A body may therefore end in another thread than it began in, which happens
with generators.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

from ..errors import LoRAError


class Writer:
    """The open turns of one injected model.

    Turns are held weakly. If an exception comes just before a `with` block closes its turn, the turn is garbage
    collected and so counts as closed.
    """

    def __init__(self) -> None:
        self.references: list[weakref.ref[Turn]] = []
        self.guard = threading.RLock()  # reentrant: a signal handler may take a turn while this thread holds the guard

    def turns(self) -> list[Turn]:
        """Return the open turns, outermost first."""
        with self.guard:
            return [turn for turn in (reference() for reference in self.references) if turn is not None]

    def admit(self, turn: Turn) -> None:
        """Open a turn in this thread, or move an open turn to this thread.

        Raises:
            LoRAError: another thread has a turn.
        """
        thread = threading.current_thread()
        with self.guard:
            turns = self.turns()
            for other in turns:
                if other is not turn and other.thread is not thread and other.thread.is_alive():
                    raise LoRAError(
                        f"{turn.verb}: {other.verb} is under way on this model in the thread {other.thread.name!r}. "
                        "Only one thread at a time may change a model: hold one threading.Lock around each such call, "
                        "including its whole `with` block, and around the forwards of other threads."
                    )
            turn.thread = thread
            self.references = [weakref.ref(each) for each in (*turns, *([] if turn in turns else [turn]))]

    def is_at(self, verb: str, before: Turn | None = None) -> bool:
        """Return whether a turn with this verb is open.

        Args:
            verb: the call, as messages show it.
            before: if given, only turns that were opened before this one count.
        """
        turns = self.turns()
        return any(turn.verb == verb for turn in (turns if before is None else turns[: turns.index(before)]))

    def dismiss(self, turn: Turn) -> None:
        """Close a turn. Closing it twice is harmless."""
        with self.guard:
            self.references = [weakref.ref(each) for each in self.turns() if each is not turn]


class Turn:
    """A turn at changing one model, or several, while its `with` block lasts.

    Args:
        verb: the call, as messages show it.
        writers: one for each model.
    """

    def __init__(self, verb: str, writers: Iterable[Writer]) -> None:
        self.verb, self.writers = verb, list(writers)
        self.thread = threading.current_thread()

    def __enter__(self) -> Turn:
        self.go_on()
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self.writers:
            writer.dismiss(self)

    def go_on(self) -> None:
        """Give this turn to the present thread.

        Raises:
            LoRAError: another thread has a different turn.
        """
        for writer in self.writers:
            writer.admit(self)
