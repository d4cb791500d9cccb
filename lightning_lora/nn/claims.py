"""One writer at a time: only one thread may change or save an injected model.

Each call that changes a model, or reads it for a file or a dictionary, claims it. A call with a body, such as `with
merged(model)`, keeps its claim until the body has ended, because the end of the block writes too. Claims of one thread
nest. A call from another thread is refused at once. Nobody waits for a claim, so there is no deadlock.

It is no threading.RLock, for two reasons. A generator's body may end in another thread than it began in, and only the
thread that acquired an RLock can release it. And an exception that comes just before a block ends its claim would leave
an RLock locked for good; a claim is held weakly here, so it is garbage collected with the block's frame.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from ..errors import LoRAError

DISABLED, OFF = "disable_adapter", "scaled(model, 0)"
# Which verbs are refused inside of which blocks. OFF is `scaled` with values from before training in place of trained
# ones. Inside of `merged` every verb is right, and a copy or pickle made there is a merged model, as after merge(): its
# state dict holds W, and unmerge restores each bit. A verb that no row names is an error at its first call.
ALWAYS: frozenset[str] = frozenset()
CHANGES = frozenset({"scaled", OFF, DISABLED})  # puts in, takes out, loads or sets for good
READS = frozenset({OFF, DISABLED})  # reads trained tensors, in whose places others stand
ACTS = frozenset({DISABLED})  # writes what acts now, and nothing does
REFUSED: dict[str, frozenset[str]] = {
    **dict.fromkeys(("merged", "scaled", OFF, DISABLED, "merge", "unmerge", "cast or move", "adopt"), ALWAYS),
    **dict.fromkeys(("inject", "load_adapter", "attach", "detach", "set_strength", "unload"), CHANGES),
    **dict.fromkeys(("merge_and_unload", "load_state_dict", "initialize_from_data"), CHANGES),
    **dict.fromkeys(("take_adapter", "save_adapter", "adapter_state_dict", "save_checkpoint"), READS),
    **dict.fromkeys(("lora_param_groups",), READS),
    **dict.fromkeys(("merged_state_dict", "merged_tensors", "save_merged"), ACTS),
}
REFUSED_INSIDE = (
    "refused inside `with disable_adapter(model)` and `with scaled(model, ...)`, which last for forwards alone. Do it "
    "before or after the block."
)


class Claims:
    """The open claims on one injected model. All are of one thread, or of threads that have ended.

    Each model has a guard of its own. An exception can leave a guard held where another thread or a debugger raises it
    at the very end of a `with`; one guard for all models then locked every other thread out of every model.
    """

    def __init__(self) -> None:
        self.open: WeakSet[Claim] = WeakSet()
        self.guard = threading.RLock()  # reentrant: a signal's handler may claim the model while this thread holds it

    def admit(self, claim: Claim) -> None:
        """Open a claim, or move an open one to its present thread.

        Raises:
            LoRAError: another thread has a claim, or the verb is refused inside of an open block.
        """
        with self.guard:
            for other in list(self.open):
                if other is not claim and other.thread is not claim.thread and other.thread.is_alive():
                    raise LoRAError(
                        f"{claim.verb}: {other.verb} is under way on this model in the thread {other.thread.name!r}. "
                        "Only one thread at a time may change or save a model: hold one threading.Lock around each "
                        "such call, including its whole `with` block, and around the forwards of other threads."
                    )
            if any(self.holds(block, other_than=claim) for block in REFUSED[claim.verb]):
                raise LoRAError(f"{claim.verb}: {REFUSED_INSIDE}")
            self.open.add(claim)

    def holds(self, verb: str, *, other_than: Claim | None = None) -> bool:
        """Return whether a claim with this verb is open, other than the given one."""
        return any(claim.verb == verb for claim in list(self.open) if claim is not other_than)


class Claim:
    """A claim on one model, or on several. `models` are the open claims of each."""

    def __init__(self, verb: str, models: Iterable[Claims]) -> None:
        self.verb = verb
        self.models = list(models)
        self.thread = threading.current_thread()

    def take(self) -> None:
        """Open this claim in the present thread, or move it there.

        Raises:
            LoRAError: another thread has a different claim, or the verb is refused inside of an open block. This claim
                then stays with its thread.
        """
        before = self.thread
        self.thread = threading.current_thread()
        try:
            for each in self.models:
                each.admit(self)
        except BaseException:
            self.thread = before
            raise


@contextmanager
def claimed(verb: str, *models: Claims) -> Iterator[Claim]:
    """Claim models for the present thread inside the block.

    Args:
        verb: the call, as messages show it.
        models: the open claims of each model.

    Raises:
        LoRAError: another thread has a claim on one of them.
    """
    claim = Claim(verb, models)
    try:
        claim.take()
        yield claim
    finally:
        for each in claim.models:
            with each.guard:
                each.open.discard(claim)
