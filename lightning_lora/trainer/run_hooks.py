"""What LoRACallback's hooks do around training batches, and when a fit or a run ends.

Only the first batch of an epoch walks the model. What is noted is in the record of the injection, so that it is the
module's own, whichever Trainers run it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.sharding import reshard_
from ..model.adapted_model import find_model
from ..model.gradients import explain_missing_gradients
from ..model.injection import Injection
from ..model.merging import unmerge
from ..model.patches import unpatch
from .deepspeed_optimizer import warn_of_unfrozen
from .evaluation import end_evaluation
from .record import forget_record, is_merged_for_good, record_of


def begin_epoch(module: nn.Module) -> None:
    """Let the first batch look at what was unfrozen and at modes, when every hook of the epoch's start has run."""
    record = record_of(module)
    if record is not None:
        record.run.epoch_begins = True


def begin_batch(trainer: Any, module: nn.Module) -> None:
    """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode. In place."""
    record = record_of(module)
    if record is None:
        return
    if "merged" in record.marks:
        unmerge(module)
        record.marks.discard("merged")
        record.run.merged_here = False
    record.run.dropping = True
    if record.run.epoch_begins:
        record.run.epoch_begins = False
        _record_unfrozen(trainer, module)


def _record_unfrozen(trainer: Any, module: nn.Module) -> None:
    """Record base parameters that became trainable, with a copy of each: their values from before training."""
    handle = find_model(module)
    if handle is not None:
        reshard_(module for _, module in handle.root_modules)
        unfrozen = handle.record_trainable(untouched=True)
        for optimizer in trainer.optimizers if unfrozen else ():
            warn_of_unfrozen(optimizer, unfrozen)


def end_batch(module: nn.Module) -> None:
    """Let dropout follow each layer's own mode again. In place."""
    record = record_of(module)
    if record is not None:
        record.run.dropping = False


def end_fit(module: nn.Module) -> None:
    """Note that the innermost fit came to its end."""
    record = record_of(module)
    if record is not None:
        record.run.fit_ended = True


def close_fit(record: Injection) -> bool:
    """Leave the innermost fit. Tell whether it came to its end and no other fit is under way."""
    ended, record.run.fit_ended = record.run.fit_ended, False
    record.run.fits = max(record.run.fits - 1, 0)
    if ended:
        record.marks.add("trained")
    return ended and not record.run.fits


def leave(module: nn.Module) -> None:
    """Unmerge the module at the end of a run, and let dropout follow modes again. In place."""
    end_batch(module)
    end_evaluation(module)
    forget_record(module)
    if is_merged_for_good(module):
        unpatch(module.modules())


def break_off(module: nn.Module, exception: BaseException) -> None:
    """Leave a run that an exception or Ctrl-C has ended; explain it if merged weights caused it. In place."""
    explain_missing_gradients(exception, module)
    record = record_of(module)
    if record is not None:
        record.run.fits, record.run.fit_ended = 0, False
    leave(module)
