"""An injection: its options, and the facts about the model that later calls need.

An injected model has one injection. The injected module and each adapted layer hold it, so that it can be found from
any module that holds the layers: the injected module, a module around it, a network inside it, or a new module around
the same network.

What is known of single tensors and modules goes with these, see facts.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import INJECTION_ATTRIBUTE
from ..nn.attached_factors import Attachment
from ..nn.claims import Claims
from ..nn.gradient_checkpointing import StrengthLog
from .facts import Fact

# What holds of an injection. "validated": finish_injection has checked that each entry of the options names something.
# "merged": merge was called, and since then unmerge was not called for all layers. "merges by mode": eval() merges and
# train() unmerges. "started": initialize_from_data was called, so a fit does not start from its own data. "quantized":
# a message said that layers with quantized weights stay factored. "trained": a fit came to its end. "ended": the
# adapters were taken out. "attached alone": nothing is trained, and the injection is of attached adapters.
# "factored": a merged evaluation called `scaled`, so evaluations of the run stay factored, and a message said so.
Mark = Literal[
    "validated",
    "merged",
    "merges by mode",
    "started",
    "quantized",
    "trained",
    "ended",
    "attached alone",
    "factored",
]


NOT_COPIED = ("claims", "strength_log", "fits", "in_training_batch", "merged_to_evaluate")  # of what happens right now


@dataclass(frozen=True)
class Chosen:
    """What a loaded adapter adapts and trains in a model, which no option selects. Names are those at injection.

    Attributes:
        layers: each layer or single parameter, with its r, scaling and parts: an adapter's Layer.
        tables: the numbers of the trained rows of each table.
        whole: names of parameters that are fully trained.
        scope: the beginning of the names of the part of the model that the adapter is for, "" or ending in a dot.
    """

    layers: Mapping[str, Any]
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    scope: str = ""


@dataclass(eq=False)
class Injection:
    """One injection."""

    config: LoRAConfig
    seed: str = ""  # the text that adapters are drawn from; "" means the state of the random stream
    chosen: Chosen | None = None  # what a loaded adapter adapts and trains; None: what the options select
    layers: list[str] = field(default_factory=list)  # the names of the adapted layers, when they were last listed
    trained_count: int = 0  # how many base parameters were recorded as trained, so that a hook sees a change at once
    facts: list[Fact] = field(default_factory=list)  # of tensors of the model. A copy's are in its modules
    origin: dict[str, str] = field(default_factory=dict)  # what a loaded adapter's file says of its base, see Adapter
    marks: set[Mark] = field(default_factory=set)
    attached: dict[str, Attachment] = field(default_factory=dict)  # the attached adapters, in the order of their names
    run: Any = None  # what trainer/run_state.py keeps; model/ copies it and hands it on, and does not read it
    fits: int = 0  # how many fits of the model are under way, one inside the other; their optimizers hold its tensors
    in_training_batch: bool = False  # one runs now, in which dropout acts in layers that are kept in eval mode too
    merged_to_evaluate: bool = False  # merged for one evaluation, whose end unmerges; `scaled` leaves it factored
    root: weakref.ref[nn.Module] | None = None  # the injected module; None in a copy of the injection
    claims: Claims = field(default_factory=Claims)  # the open ones; a copy has its own
    strength_log: StrengthLog = field(default_factory=StrengthLog)  # of blocks; a copy is in none

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a part of the model would bring along values of the whole model; its modules have their facts.
        return {name: value for name, value in vars(self).items() if name not in NOT_COPIED} | {
            "root": None,
            "facts": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, claims=Claims(), strength_log=StrengthLog())

    @property
    def has_trained_adapter(self) -> bool:
        """Whether inject or a loaded adapter adapted the model; else adapters are attached alone."""
        return "attached alone" not in self.marks

    def begin(self, root: nn.Module) -> None:
        """Let a module hold the injection as the injected module. In place.

        Raises:
            LoRAError: another thread has injected the module meanwhile.
        """
        self.root = weakref.ref(root)
        earlier = vars(root).get(INJECTION_ATTRIBUTE)
        if earlier is not None and "ended" in earlier.marks:  # in a copy, of which a part got another adapter
            delattr(root, INJECTION_ATTRIBUTE)
        if vars(root).setdefault(INJECTION_ATTRIBUTE, self) is not self:
            raise LoRAError(
                f"inject: another thread has injected this {type(root).__name__} meanwhile. One thread at a time "
                "changes a model: hold one threading.Lock of your own around such calls."
            )

    def end(self, root: nn.Module) -> None:
        """Take the injection out of the module that a handle has as its root, and out of the injected one. In place."""
        self.marks.add("ended")
        for module in (root, self.holder()):
            if module is not None and vars(module).get(INJECTION_ATTRIBUTE) is self:
                delattr(module, INJECTION_ATTRIBUTE)

    def holder(self) -> nn.Module | None:
        """Return the injected module, or None where it is gone or holds another injection."""
        root = self.root() if self.root is not None else None
        return root if root is not None and vars(root).get(INJECTION_ATTRIBUTE) is self else None
