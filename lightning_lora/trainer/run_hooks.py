"""What LoRACallback's hooks do around training batches, and when a fit or a run ends.

Only the first batch of an epoch walks the model. What is noted is in the injection, so that it is the
module's own, whichever Trainers run it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.deepspeed_optimizer import warn_of_unfrozen
from ..distributed.sharding import reshard_
from ..model.adapted_model import find_adapted
from ..model.gradients import explain_missing_gradients
from ..model.injection import Injection
from ..model.merging import unmerge
from ..model.patches import unpatch
from .evaluation import end_evaluation
from .run_state import forget_injection, injection_of, is_merged_for_good, run_of


def begin_epoch(module: nn.Module) -> None:
    """Let the first batch look at what was unfrozen and at modes, when every hook of the epoch's start has run."""
    injection = injection_of(module)
    if injection is not None:
        run_of(injection).epoch_begins = True


def begin_batch(trainer: Any, module: nn.Module) -> None:
    """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode. In place."""
    injection = injection_of(module)
    if injection is None:
        return
    if "merged" in injection.marks:
        unmerge(module)
        injection.marks.discard("merged")
        injection.merged_to_evaluate = False
    injection.in_training_batch = True
    if run_of(injection).epoch_begins:
        run_of(injection).epoch_begins = False
        _record_unfrozen(trainer, module)


def _record_unfrozen(trainer: Any, module: nn.Module) -> None:
    """Record base parameters that became trainable, with a copy of each: their values from before training."""
    handle = find_adapted(module)
    if handle is not None:
        reshard_(module for _, module in handle.root_modules)
        unfrozen = handle.record_trainable(untouched=True)
        for optimizer in trainer.optimizers if unfrozen else ():
            warn_of_unfrozen(optimizer, unfrozen)


def end_batch(module: nn.Module) -> None:
    """Let dropout follow each layer's own mode again. In place."""
    injection = injection_of(module)
    if injection is not None:
        injection.in_training_batch = False


def end_fit(module: nn.Module) -> None:
    """Note that the innermost fit came to its end."""
    injection = injection_of(module)
    if injection is not None:
        run_of(injection).fit_ended = True


def close_fit(injection: Injection) -> bool:
    """Leave the innermost fit. Tell whether it came to its end and no other fit is under way."""
    run = run_of(injection)
    ended = run.fit_ended
    run.fit_ended = False
    injection.fits = max(injection.fits - 1, 0)
    if ended:
        injection.marks.add("trained")
    return ended and not injection.fits


def leave(module: nn.Module) -> None:
    """Unmerge the module at the end of a run, and let dropout follow modes again. In place."""
    end_batch(module)
    end_evaluation(module)
    forget_injection(module)
    if is_merged_for_good(module):
        unpatch(module.modules())


def break_off(module: nn.Module, exception: BaseException) -> None:
    """Leave a run that an exception or Ctrl-C has ended; explain it if merged weights caused it. In place."""
    explain_missing_gradients(exception, module)
    injection = injection_of(module)
    if injection is not None:
        injection.fits = 0
        run_of(injection).fit_ended = False
    leave(module)
