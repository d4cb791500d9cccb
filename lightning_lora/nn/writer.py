"""One writer at a time: only one thread may change an injected model.

Each call that changes a model takes a turn. A call with a body, such as `with merged(model)`, keeps its turn until the
body has ended, because the end of the block writes too. Turns of one thread nest. A call from another thread is refused
at once. Nobody waits for a turn, so there is no deadlock.

A call that reads an adapter for a file or a dictionary is a Reading. It is refused where another thread changes what it
reads, because the result would be a part of one adapter and a part of another.

A turn is no lock of the operating system. A body may therefore end in another thread than it began in, which happens
with generators.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

from ..errors import LoRAError

LOCK = "hold one threading.Lock around each such call"
KEEP_MERGED = frozenset({"merged"})  # the block itself changes nothing: it calls merge and unmerge
KEEP_ADAPTER = KEEP_MERGED | {"merge", "unmerge"}  # what is saved of an adapter is the same during these


class Writer:
    """The open turns of one injected model.

    Turns are held weakly. If an exception comes just before a `with` block closes its turn, the turn is garbage
    collected and so counts as closed.
    """

    def __init__(self) -> None:
        self.references: list[weakref.ref[Turn]] = []
        self.readings: weakref.WeakSet[Reading] = weakref.WeakSet()
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
                        f"Only one thread at a time may change a model: {LOCK}, "
                        "including its whole `with` block, and around the forwards of other threads."
                    )
            turn.thread, turn.rests = thread, False
            for reading in self.readings:
                reading.note(turn)
            self.references = [weakref.ref(each) for each in dict.fromkeys((*turns, turn))]

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
        self.rests = False  # inside a block that changes values at its beginning and its end alone

    def __enter__(self) -> Turn:
        try:
            self.go_on()
        except BaseException:
            self.__exit__()  # where some writers have admitted it: who keeps the error would keep the turn too
            raise
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


class Reading:
    """A read of what one model holds, or several, while its `with` block lasts. Call `check` when all is read.

    An exception that comes of another thread's change is replaced by one that says so.

    Args:
        verb: the call, as messages show it.
        writers: one for each model.
        beside: verbs that other threads may call meanwhile, because they do not change what is read.

    Raises:
        LoRAError: another thread is changing what is read.
    """

    def __init__(self, verb: str, writers: Iterable[Writer], beside: frozenset[str]) -> None:
        self.verb, self.writers, self.beside = verb, list(writers), beside
        self.thread = threading.current_thread()
        self.disturbance: tuple[str, str] | None = None  # the call of another thread, and the name of that thread

    def note(self, turn: Turn) -> None:
        """Note a turn that is open while this is read, if it changes what is read."""
        if turn.thread is not self.thread and turn.verb not in self.beside:
            self.disturbance = turn.verb, turn.thread.name

    def check(self) -> None:
        """Raise LoRAError if another thread has changed what was read."""
        if self.disturbance is not None:
            other, thread = self.disturbance
            raise LoRAError(
                f"{self.verb}: {other} changed this model at the same time, in the thread {thread!r}. A part of what "
                f"was read may be from before and a part from after, so it is not used. Call it again, and {LOCK}."
            )

    def __enter__(self) -> Reading:
        for writer in self.writers:
            with writer.guard:
                writer.readings.add(self)
                for turn in writer.turns():
                    if turn.thread.is_alive() and not turn.rests:
                        self.note(turn)
        self.check()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for writer in self.writers:
            with writer.guard:
                writer.readings.discard(self)
        if isinstance(error, Exception):
            self.check()
