"""One writer at a time: which thread changes an injected model, and by which call.

A call that changes a model takes a turn. One with a body, as `with merged(model)`, keeps it until the body has ended,
because its end writes too. Turns of one thread nest. A call of another thread is refused at once: nobody waits here, so
nothing can lock up. A turn belongs to no lock of the operating system, so that a body may end in another thread than it
began in, as that of a generator can.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

from ..errors import LoRAError


class Writer:
    """The turns that are open on one injected model.

    A turn that was lost is closed: an exception may come in its `with` block's last instruction.
    """

    def __init__(self) -> None:
        self.references: list[weakref.ref[Turn]] = []
        self.guard = threading.RLock()  # a signal's handler may come here while this thread holds it

    def turns(self) -> list[Turn]:
        """Return the open turns, the outermost first."""
        with self.guard:
            return [turn for turn in (reference() for reference in self.references) if turn is not None]

    def admit(self, turn: Turn) -> None:
        """Open a turn, or go on with an open one, in this thread.

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
                        "One thread at a time changes a model: hold one threading.Lock of your own around each such "
                        "call, the whole `with` block included, and around the forwards of other threads."
                    )
            turn.thread = thread
            self.references = [weakref.ref(each) for each in (*turns, *([] if turn in turns else [turn]))]

    def is_at(self, verb: str, before: Turn | None = None) -> bool:
        """Return whether a turn of this verb is open; one that was opened before another, where that is given."""
        turns = self.turns()
        return any(turn.verb == verb for turn in (turns if before is None else turns[: turns.index(before)]))

    def dismiss(self, turn: Turn) -> None:
        """Close a turn; harmless when repeated."""
        with self.guard:
            self.references = [weakref.ref(each) for each in self.turns() if each is not turn]


class Turn:
    """A turn at changing one model, or several, while its `with` block lasts.

    Args:
        verb: the call, as messages show it.
        writers: of the models.
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
        """Let this thread have the turn from now on, whichever had it before.

        Raises:
            LoRAError: another thread has a turn of its own.
        """
        for writer in self.writers:
            writer.admit(self)
