"""What LoRACallback knows of one LightningModule from setup to teardown."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.gradients import explain_missing_gradients
from ..model.merging import unmerge
from ..model.patches import unpatch
from .after_fit import is_merged_for_good
from .checkpointing_off import warn_of_checkpointing_off
from .evaluation import Evaluation
from .hyperparameters import LoggedOptions
from .step_lists import StepLists
from .untrained import warn_of_untrained_in


class FitState:
    """The state of one module, which does not hold the module itself.

    Fits are counted, because a hook of a fit may run another fit of the same module.

    Attributes:
        evaluation: merging for it.
        logged: the options among the module's hyper-parameters.
        running: how many fits are under way, one inside the other.
        ended: whether the innermost fit came to its end; a finder of Lightning's may break one off.
    """

    def __init__(self) -> None:
        self.evaluation = Evaluation()
        self.logged = LoggedOptions()
        self.running = 0
        self.ended = False
        self._lists: StepLists | None = None

    def lists(self, module: nn.Module) -> StepLists:
        """Return the lists of the module, made anew if it was injected anew."""
        if self._lists is None or not self._lists.is_current():
            self._lists = StepLists(module)
        return self._lists

    def forget_lists(self) -> None:
        """Let the next batch make the lists anew, because modes (training or evaluation) may have changed."""
        self._lists = None

    def start_batch(self, module: Any) -> None:
        """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode. In place."""
        lists = self.lists(module)
        if lists.is_merged():
            unmerge(module)
            self.evaluation.merged = False
        lists.override_dropout(True)
        if not lists.trained_a_batch:
            warn_of_checkpointing_off(module)

    def end_batch(self, trainer: Any, module: Any) -> None:
        """Let dropout follow each layer's mode again; warn of layers that an optimizer's first step did not train.

        In place. Where no optimizer has stepped for the first time, nothing is looked at.
        """
        lists = self.lists(module)
        lists.override_dropout(None)
        lists.trained_a_batch = True
        stepped = len(lists.record.steps.on_gradients) if lists.record else 0
        if stepped != lists.stepped:
            lists.stepped = stepped
            warn_of_untrained_in(trainer, module)

    def start_evaluation_batch(self, trainer: Any, module: Any) -> None:
        """Merge at the first batch, unless a fit has merged the module for good. In place."""
        if not is_merged_for_good(module):
            self.evaluation.start_batch(trainer, module, self.lists(module))

    def begin_fit(self) -> None:
        """Count a fit that starts."""
        self.running += 1

    def end_fit(self) -> None:
        """Note that the innermost fit came to its end."""
        self.ended = True

    def close_fit(self) -> bool:
        """Leave the innermost fit. Tell whether it came to its end and no other fit is under way."""
        ended, self.ended = self.ended, False
        self.running = max(self.running - 1, 0)
        return ended and not self.running

    def leave(self, module: Any) -> None:
        """Unmerge the module, and give it its own dropout and hyper-parameters back. In place."""
        if self._lists is not None:
            self.lists(module).override_dropout(None)
            self._lists = None
        self.evaluation.end(module)
        self.logged.remove(module)
        if is_merged_for_good(module):
            unpatch(module.modules())

    def break_off(self, module: Any, exception: BaseException) -> None:
        """Leave a run that an exception or Ctrl-C has ended; explain it if merged weights caused it. In place."""
        explain_missing_gradients(exception, module)
        self.leave(module)
